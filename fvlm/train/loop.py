"""The training loop: a step, its record, and what happens between steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from fvlm.config import RunConfig
from fvlm.data.plan import Plan
from fvlm.schema import ConfigError
from fvlm.train import guard, objectives, schedule
from fvlm.train.checkpoint import CheckpointStore, RunState, random_state, set_random_state
from fvlm.train.clock import Clock
from fvlm.train.engine import Engine
from fvlm.train.figures import require_figures
from fvlm.train.metrics import MetricsWriter, Progress
from fvlm.train.work import step_flops


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """Sums of one step over all ranks and micro-batches."""

    loss: float
    """Σ −log p with the mode's own tokens."""
    labels: float
    coarse: float
    """Same labels with coarse tokens; 0 unless `probed`."""
    objective: float
    """What was minimised, before the division."""
    wait_seconds: float
    """Σ over ranks of the time spent waiting for data."""
    skipped: float
    """Samples lost while reading."""
    probed: bool
    """Whether `coarse` was measured."""


class Trainer:
    """Runs a plan's steps to its end.

    Args:
        engine: weights and optimizer, already resumed where there was something to resume.
        config: the run.
        plan: the run's, for the work that a step needs.
        state: where the run stands; updated in place.
        store: where checkpoints go.
        writer: records, on rank 0; None elsewhere.
        evaluate: figures of the validation set, from the model and the step, called on every rank; None: none.
    """

    def __init__(
        self,
        engine: Engine,
        config: RunConfig,
        plan: Plan,
        state: RunState,
        store: CheckpointStore,
        writer: MetricsWriter | None,
        evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None,
    ):
        self.engine, self.config, self.plan, self.state = engine, config, plan, state
        self.store, self.writer, self.evaluate = store, writer, evaluate
        self.world, self.train = engine.world, config.train
        self._saved_step = state.step
        self._clock = Clock(state.wall_time_sec, self.world.device, self.world.size)
        self._last_record: dict[str, Any] = {}

    def run(self, loader: Iterable) -> RunState:
        """All remaining steps of `loader`, then a last evaluation and checkpoint. Returns the final state."""
        shown = self.world.is_main
        with closing(Progress(self.train.total_samples, self.state.samples_seen, shown)) as progress:
            for loaded in loader:
                sums, norm = self.step(loaded)
                self._account(loaded, sums)
                if sums.probed or self.state.step % self.train.log_every == 0:
                    record = self._record(sums, norm)
                    progress.update(self.state.samples_seen, loss=record["train_loss"], mfu=record["mfu"])
                self._between_steps()
            self._finish()
        return self.state

    def step(self, loaded: Any) -> tuple[StepSums, float]:
        """Forward, backward and update for one step. Returns its sums and the gradient's norm.

        Raises guard.DivergenceError, on all ranks, where loss or gradient is not finite; nothing is updated then.
        """
        step, engine = loaded.step, self.engine
        iterations = schedule.fine_iterations(self.train.fine_iterations, step.index)
        arguments = objectives.call_arguments(self.train, iterations)
        probe = self._probes(step.index)
        totals = torch.zeros(6, dtype=torch.float64, device=self.world.device)
        scored = []
        for batch, keys in zip(loaded.batches, loaded.keys, strict=True):
            if probe:
                totals[2] += objectives.coarse_loss_sum(engine.module, batch)
            out = engine.forward(batch=batch, **arguments)
            loss = objectives.loss_sum(out, self.train.lambda_coarse)
            engine.backward(loss, step.planned_labels)
            totals[:2] += torch.stack([out.loss_sum.detach().double(), out.num_labels.double()])
            if out.coarse_loss_sum is not None:
                totals[2] += out.coarse_loss_sum.detach()
            totals[3] += loss.detach()
            scored.append((batch, out.logprobs.detach(), keys))
        totals[4] += loaded.wait_s
        totals[5] += sum(loaded.skipped.values())
        sums = StepSums(**dict(zip(_FIELDS, self.world.sum(totals).tolist(), strict=True)), probed=probe)
        guard.check(step.index, "loss", sums.objective, lambda: guard.suspects(scored), self.world)
        norm = engine.step(schedule.learning_rates(self.train, step.samples_seen / self.train.total_samples))
        guard.check(step.index, "gradient norm", norm, lambda: list(chain(*loaded.keys)), self.world)
        return sums, norm

    def _probes(self, index: int) -> bool:
        """Whether this step measures the coarse loss on its own samples before it learns from them."""
        if self.train.mode != "coarse_fine" or self.config.model.architecture != "foveated" or self.train.lambda_coarse:
            return False
        return self.train.probe_every > 0 and index % self.train.probe_every == 0

    def _account(self, loaded: Any, sums: StepSums) -> None:
        """Move the state past a step that is done."""
        state = self.state
        state.plan = asdict(loaded.step.state)
        state.loss_since_evaluation = [
            state.loss_since_evaluation[0] + sums.loss,
            state.loss_since_evaluation[1] + sums.labels,
        ]
        if sums.skipped:  # the same on all ranks, so that all of them join in
            lost = sum((Counter(part) for part in self.world.gather(dict(loaded.skipped))), Counter(state.skipped))
            state.skipped = dict(lost)
        iterations = schedule.fine_iterations(self.train.fine_iterations, loaded.step.index)
        flops = step_flops(self.engine.module.config, self.plan, loaded.step, self.train.mode, iterations)
        self._clock.count(samples=loaded.step.samples, tokens=sum(p.tokens for p in loaded.step.packs), flops=flops)

    def _record(self, sums: StepSums, norm: float) -> dict[str, Any]:
        """The record of a step, written and returned."""
        labels = max(1.0, sums.labels)
        own_loss, coarse = sums.loss / labels, sums.coarse / labels
        coarse_only = self.train.mode == "coarse_only"
        with_coarse = sums.probed or self.train.lambda_coarse > 0
        rates = schedule.learning_rates(self.train, self.state.samples_seen / self.train.total_samples)
        self._last_record = {
            "step": self.state.step,
            "samples_seen": self.state.samples_seen,
            "wall_time_sec": round(self._clock.wall_seconds(), 3),
            "train_loss": sums.objective / labels,
            "loss_fine": None if coarse_only else own_loss,
            "loss_coarse": own_loss if coarse_only else coarse if with_coarse else None,
            "loss_ratio": own_loss / coarse if with_coarse and coarse else None,
            "grad_norm": norm,
            **{f"lr_{group}": rate for group, rate in rates.items()},
            "fine_iterations": schedule.fine_iterations(self.train.fine_iterations, self.state.step - 1),
            "labels": int(sums.labels),
            **self._clock.rates(),
            "data_wait_sec": sums.wait_seconds / self.world.size,
            "skipped_samples": sum(self.state.skipped.values()),
            "skipped_steps": self.engine.skipped_steps,
        }
        if self.writer is not None:
            self.writer.step(self._last_record)
        return self._last_record

    def _between_steps(self) -> None:
        step, is_best = self.state.step, False
        if self.evaluate is not None and self.train.eval_every and step % self.train.eval_every == 0:
            is_best = self._evaluate()
        if is_best or (self.train.checkpoint_every and step % self.train.checkpoint_every == 0):
            self._save(is_best)

    def _finish(self) -> None:
        is_best = False
        if self.evaluate is not None and self.state.last_evaluation != self.state.step:
            is_best = self._evaluate()
        if is_best or self._saved_step != self.state.step:
            self._save(is_best)

    def _evaluate(self) -> bool:
        """Record an evaluation; returns whether it is the best so far."""
        with self._clock.paused():
            random_before = random_state()  # evaluating must not change what is trained next
            figures = self._figures()
            set_random_state(random_before)
        state = self.state
        require_figures(self.config.best_metric, figures)
        score = sum(weight * figures[name] for name, weight in self.config.best_metric.items())
        loss_sum, labels = state.loss_since_evaluation
        known = {key: self._last_record.get(key) for key in ("grad_norm", "lr_connector", "lr_dino", "lr_llm")}
        row = {
            "step": state.step,
            "samples_seen": state.samples_seen,
            "wall_time_sec": round(self._clock.wall_seconds(), 3),
            "train_loss": loss_sum / labels if labels else None,
            **known,
            "throughput": self._last_record.get("throughput_samples_sec"),
            "gpu_mem_gb": self._last_record.get("gpu_mem_allocated_gb"),
            **figures,
            "score": score,
        }
        if self.writer is not None:
            self.writer.evaluation(row)
        state.last_evaluation, state.metrics, state.loss_since_evaluation = state.step, figures, [0.0, 0.0]
        if state.best is not None and score <= state.best["score"]:
            return False
        state.best = {"score": score, "step": state.step, "metrics": figures}
        return True

    def _figures(self) -> dict[str, float]:
        """What `evaluate` gives; what it finds wrong with the set or the scores is an EvaluationError."""
        try:
            return dict(self.evaluate(self.engine.module, self.state.step))
        except ConfigError:
            raise
        except ValueError as error:
            raise guard.EvaluationError(f"evaluation after step {self.state.step}: {error}") from error

    def _save(self, is_best: bool) -> None:
        with self._clock.paused():
            self.state.wall_time_sec = self._clock.wall_seconds()
            self.store.save(self.engine, self.state, self.config, best=is_best)
        self._saved_step = self.state.step


_FIELDS = ("loss", "labels", "coarse", "objective", "wait_seconds", "skipped")
