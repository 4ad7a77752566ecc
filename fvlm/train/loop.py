"""The training loop: a step, its record, and what happens between steps."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fvlm.config import RunConfig
from fvlm.data.plan import Plan
from fvlm.data.statistics import DataStatistics
from fvlm.schema import ConfigError
from fvlm.train import guard, objectives, schedule
from fvlm.train.checkpoint import CheckpointStore, RunState, random_state, read_state, set_random_state
from fvlm.train.clock import Clock
from fvlm.train.engine import Engine
from fvlm.train.figures import require_figures
from fvlm.train.heartbeat import Heartbeat
from fvlm.train.metrics import MetricsWriter, Progress
from fvlm.train.preemption import Notice, Preempted
from fvlm.train.work import step_flops
from fvlm.train_config import GROUPS

logger = logging.getLogger(__name__)


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
    read_seconds: float
    """Σ over ranks of their workers' time in the step's packs."""
    decode_seconds: float
    """Of these, decoding JPEGs."""
    skipped: float
    """Samples lost while reading."""
    pairs: float
    """Of `dpo`, and the next three: sums over the pairs (`fvlm.train.preference.Preferences`); else 0."""
    reward_chosen: float
    reward_rejected: float
    correct: float
    told: float
    """Ranks that were told to stop."""
    probed: bool
    """Whether `coarse` was measured."""

    @property
    def train_loss(self) -> float:
        """What was minimised, per pair or per label."""
        return self.objective / max(1.0, self.pairs or self.labels)

    def rewards(self) -> dict[str, float]:
        """Means over the step's pairs; empty without pairs."""
        if not self.pairs:
            return {}
        return {
            "reward_chosen": self.reward_chosen / self.pairs,
            "reward_rejected": self.reward_rejected / self.pairs,
            "reward_margin": (self.reward_chosen - self.reward_rejected) / self.pairs,
            "reward_accuracy": self.correct / self.pairs,
        }


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
        heartbeat: is told where this rank is.
        notice: whether this rank is to stop.
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
        heartbeat: Heartbeat,
        notice: Notice,
    ):
        self.engine, self.config, self.plan, self.state = engine, config, plan, state
        self.store, self.writer, self.evaluate = store, writer, evaluate
        self.heartbeat, self.notice = heartbeat, notice
        self.world, self.train = engine.world, config.train
        self._clock = Clock(state.wall_time_sec, self.world.device, self.world.size)
        self._data = DataStatistics(plan, state.samples_by_source)
        self._last_record: dict[str, Any] = {}
        self.guard = guard.Guard(self.train.guard, state.guard)
        for part in self.guard.frozen:
            engine.freeze(part)

    def run(self, loader: Iterable) -> RunState:
        """All remaining steps of `loader`, then a last evaluation and checkpoint. Returns the final state.

        Raises Preempted, on all ranks and with a checkpoint of the step before, where one of them was told to stop.
        """
        shown = self.world.is_main
        with closing(Progress(self.train.total_samples, self.state.samples_seen, shown)) as progress:
            for loaded in loader:
                try:
                    sums, norm = self.advance(loaded)
                except guard.DivergenceError:  # on all ranks: the last checkpoint may still be on its way
                    self.store.settle()
                    raise
                if sums.probed or self.state.step % self.train.log_every == 0:
                    record = self._record(sums, norm)
                    progress.update(self.state.samples_seen, loss=record["train_loss"], mfu=record["mfu"])
                if sums.told:
                    self._save(False, last=True)
                    raise Preempted(
                        f"stopped as told after step {self.state.step}; the same command goes on from there"
                    )
                self._between_steps()
                self.heartbeat.beat("data", self.state.step)
            self._finish()
        return self.state

    def advance(self, loaded: Any) -> tuple[StepSums, float]:
        """One step, the run's state moved past it, and what the guard's policy asks for. Returns what `step` does.

        Raises guard.DivergenceError, on all ranks, where the policy is to stop, with the weights of the step before.
        """
        sums, norm, scored = self.step(loaded)
        anomaly = self.guard.observe(self._loss(loaded, sums.objective), norm)
        if self.engine.skipped != (anomaly is not None):
            raise RuntimeError(f"step {loaded.step.index + 1}: device and host disagree on {anomaly or (sums, norm)}")
        if anomaly is not None:
            self._report(loaded, scored, anomaly)
        self._account(loaded, sums, counts=anomaly is None)
        if anomaly is not None:
            self._respond()
        return sums, norm

    def step(self, loaded: Any) -> tuple[StepSums, float, guard.Scored]:
        """Forward, backward and update for one step, or no update where the guard's verdict is against it.

        Returns its sums, the gradient's norm, and this rank's log-probabilities. The host waits for the device once,
        when the update is under way.
        """
        step, engine = loaded.step, self.engine
        iterations = schedule.fine_iterations(self.train.fine_iterations, step.index)
        arguments = objectives.call_arguments(self.train, iterations)
        probe = self._probes(step.index)
        totals = torch.zeros(len(_FIELDS), dtype=torch.float64, device=self.world.device)
        scored = []
        for batch, keys in zip(loaded.batches, loaded.keys, strict=True):
            self.heartbeat.beat("step", step.index + 1)
            if probe:
                totals[2] += objectives.coarse_loss_sum(engine.module, batch)
            out = engine.forward(batch=batch, **arguments)
            loss, pairs = objectives.loss_sum(out, batch, self.train)
            self.heartbeat.beat("step", step.index + 1)
            engine.backward(loss, step.planned)
            totals[:2] += torch.stack([out.loss_sum.detach().double(), out.num_labels.double()])
            if out.coarse_loss_sum is not None:
                totals[2] += out.coarse_loss_sum.detach()
            totals[3] += loss.detach()
            if pairs is not None:
                totals[8:12] += torch.stack(pairs[1:])
            scored.append((batch, out.logprobs.detach(), keys))
        for place, value in enumerate((loaded.wait_s, loaded.read_s, loaded.decode_s, len(loaded.lost)), 4):
            totals[place] += value
        totals[12] += self.notice.received is not None
        self.heartbeat.beat("step", step.index + 1)
        totals = self.world.sum(totals)
        verdict = self.guard.verdict(self._loss(loaded, totals[3]))
        norm = engine.step(schedule.learning_rates(self.train, step.samples_seen / self.train.total_samples), verdict)
        sums = StepSums(**dict(zip(_FIELDS, totals.tolist(), strict=True)), probed=probe)
        return sums, norm, scored

    @staticmethod
    def _loss(loaded: Any, objective: Any) -> Any:
        """What the guard judges: the objective per planned label, as the gradient has it; number or tensor."""
        return objective / max(1, loaded.step.planned)

    def _probes(self, index: int) -> bool:
        """Whether this step measures the coarse loss on its own samples before it learns from them."""
        if self.train.mode != "coarse_fine" or self.config.model.architecture != "foveated" or self.train.lambda_coarse:
            return False
        if self.train.objective == "dpo":  # compares answers, not tokens
            return False
        return self.train.probe_every > 0 and index % self.train.probe_every == 0

    def _report(self, loaded: Any, scored: guard.Scored, anomaly: guard.Anomaly) -> None:
        """Say on rank 0 which step was left out, why, and whose samples were in it; collective.

        Raises guard.DivergenceError where that was one too many.
        """
        step, settings = loaded.step.index + 1, self.train.guard
        ranks = guard.account(scored, self.train.packs_per_step, self.world)
        message = f"step {step}: {anomaly}; samples: {guard.describe(ranks)}"
        if self.writer is not None:
            self.writer.guard({"step": step, "policy": settings.policy, **anomaly.record(), "ranks": ranks})
        if settings.policy == "stop":
            raise guard.DivergenceError(
                f"{message}. The weights were not updated, the last checkpoint is sound: look at these samples "
                f"(launch/replay.py), lower train.learning_rate, or start again with another train.guard.policy"
            )
        if self.guard.in_a_row >= settings.max_skips:
            raise guard.DivergenceError(
                f"{message}. That is {self.guard.in_a_row} steps in a row without an update (train.guard.max_skips): "
                f"look at these samples (launch/replay.py), or lower train.learning_rate"
            )
        logger.warning("%s; the step does not count", message)

    def _respond(self) -> None:
        """What the policy asks for once a step has been left out; collective."""
        policy = self.train.guard.policy
        if policy == "roll_back":
            self._roll_back()
        part = policy.removeprefix("freeze_")
        if part == policy or part in self.guard.frozen:
            return
        if set(GROUPS) <= {*self.train.freeze, *self.guard.frozen, part}:
            raise guard.DivergenceError(f"step {self.state.step}: policy {policy} would leave nothing to train")
        self.engine.freeze(part)
        self.guard.frozen.append(part)
        logger.warning("step %d: %s is frozen from here on (train.guard.policy)", self.state.step, part)

    def _roll_back(self) -> None:
        """Weights, moments and random states of the newest checkpoint; the data since then stays behind."""
        self.heartbeat.beat("checkpoint", self.state.step)
        found, _ = self.store.find()  # after a save under way, however long it takes: the same run again does the same
        if found is None:
            logger.warning("step %d: no checkpoint to roll back to yet", self.state.step)
            return
        self.store.load(self.engine, found, read_state(found))
        logger.warning("step %d: rolled back to the weights of %s; its data is not seen again", self.state.step, found)

    def _account(self, loaded: Any, sums: StepSums, counts: bool) -> None:
        """Move the state past a step that is done; a loss that `counts` enters the mean since the last evaluation."""
        state = self.state
        state.plan = asdict(loaded.step.state)
        if counts:
            loss, count = state.loss_since_evaluation
            new = (sums.objective, sums.pairs) if sums.pairs else (sums.loss, sums.labels)
            state.loss_since_evaluation = [loss + new[0], count + new[1]]
        if sums.skipped:  # the same on all ranks, so that all of them join in
            lost = sum((Counter(part) for part in self.world.gather(dict(loaded.skipped))), Counter(state.skipped))
            state.skipped = dict(lost)
        self._data.count(loaded.step)
        state.samples_by_source = self._data.samples_by_source
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
        rates |= dict.fromkeys((group for group in GROUPS if group in self.guard.frozen), 0.0)
        record = {
            "step": self.state.step,
            "samples_seen": self.state.samples_seen,
            "wall_time_sec": round(self._clock.wall_seconds(), 3),
            "train_loss": sums.train_loss,
            **sums.rewards(),
            "loss_fine": None if coarse_only else own_loss,
            "loss_coarse": own_loss if coarse_only else coarse if with_coarse else None,
            "loss_ratio": own_loss / coarse if with_coarse and coarse else None,
            "grad_norm": norm,
            **{f"lr_{group}": rate for group, rate in rates.items()},
            "fine_iterations": schedule.fine_iterations(self.train.fine_iterations, self.state.step - 1),
            "labels": int(sums.labels),
            **self._clock.rates(),
            "data_wait_sec": sums.wait_seconds / self.world.size,
            "read_sec": sums.read_seconds,
            "decode_sec": sums.decode_seconds,
            **self._data.record(),
            "skipped_samples": sum(self.state.skipped.values()),
            **{f"skipped/{reason}": count for reason, count in sorted(self.state.skipped.items())},
            "skipped_steps": self.guard.skipped_steps,
        }
        self._last_record = {  # JSON knows no NaN
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
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
        else:
            self.store.poll()

    def _finish(self) -> None:
        is_best = False
        if self.evaluate is not None and self.state.last_evaluation != self.state.step:
            is_best = self._evaluate()
        self._save(is_best, last=True)

    def _evaluate(self) -> bool:
        """Record an evaluation; returns whether it is the best so far."""
        self.heartbeat.beat("evaluation", self.state.step)
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

    def _save(self, is_best: bool, last: bool = False) -> None:
        """Begin a checkpoint; the `last` one is made only where there is none of this step, and waited for.

        Raises CheckpointError, on all ranks, if the last one cannot be written.
        """
        self.heartbeat.beat("checkpoint", self.state.step)
        with self._clock.paused():
            self.store.settle()
            if not last or is_best or self.store.saved_step != self.state.step:
                self._account_time()
                self.state.guard = self.guard.state()
                self.store.save(self.engine, self.state, self.config, best=is_best)
            if last:
                self.store.settle(required_step=self.state.step)

    def _account_time(self) -> None:
        """Wall and device seconds up to now, into the state."""
        now = self._clock.wall_seconds()
        self.state.device_sec += (now - self.state.wall_time_sec) * self.world.size
        self.state.wall_time_sec = now


_FIELDS = ("loss", "labels", "coarse", "objective", "wait_seconds", "read_seconds", "decode_seconds", "skipped",
           "pairs", "reward_chosen", "reward_rejected", "correct", "told")  # fmt: skip
