"""The training loop: a step, its record, and what happens between steps.

The host reads what a step gave when the next one is under way, so that the device never waits for it; before a
checkpoint, an evaluation and the end it reads at once (`Trainer.settle`). What it then does is the same either way.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict
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
from fvlm.train.preemption import Interrupted, Notice, Preempted
from fvlm.train.readings import PLACES, Launched, Mailbox, StepSums
from fvlm.train.work import step_flops
from fvlm.train_config import GROUPS

logger = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module, int, Callable[[], None]], Mapping[str, float]]


class Trainer:
    """Runs a plan's steps to its end.

    Args:
        engine: weights and optimizer, already resumed where there was something to resume.
        config: the run.
        plan: the run's, for the work that a step needs.
        state: where the run stands; updated in place.
        store: where checkpoints go.
        writer: records, on rank 0; None elsewhere.
        evaluate: figures of the validation set, from the model, the step, and what to call before each pack; called on
            every rank; None: none.
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
        evaluate: Evaluate | None,
        heartbeat: Heartbeat,
        notice: Notice,
    ):
        self.engine, self.config, self.plan, self.state = engine, config, plan, state
        self.store, self.writer, self.evaluate = store, writer, evaluate
        self.heartbeat, self.notice = heartbeat, notice
        self.world, self.train = engine.world, config.train
        self._clock = Clock(state.wall_time_sec, self.world.device, self.world.size)
        self._data = DataStatistics(plan, state.samples_by_source)
        self._mailbox = Mailbox(self.world.device)
        self._pending: Launched | None = None
        self._phase = "start"
        """What a step is to the heartbeat: the first one compiles."""
        self._told = False
        """Whether a rank was told to stop, as far as it was read."""
        self._evaluated = False
        """Whether there was an evaluation since the last checkpoint."""
        self.guard = guard.Guard(self.train.guard, state.guard, self.world.device)
        for part in self.guard.frozen:
            engine.freeze(part)

    def run(self, loader: Iterable) -> RunState:
        """All remaining steps of `loader`, then a last evaluation and checkpoint. Returns the final state.

        Raises Preempted, on all ranks and with a checkpoint of the step before, where one of them was told to stop, and
        guard.DivergenceError, on all ranks, where the guard's policy is to stop.
        """
        try:
            with closing(Progress(self.train.total_samples, self.state.samples_seen, self.world.is_main)) as progress:
                if self._evaluates_at(self.state.step) and self.state.last_evaluation != self.state.step:
                    self._between_steps(self.state.step)  # it was told to stop before that
                for loaded in loader:
                    self.advance(loaded)
                    shown = self.state.last_record
                    progress.update(self.state.samples_seen, loss=shown.get("train_loss"), mfu=shown.get("mfu"))
                    self._between_steps(loaded.step.index + 1)
                    self.heartbeat.beat("data", loaded.step.index + 1)
                self._finish()
        except guard.DivergenceError:  # the last checkpoint may still be on its way
            self._publish()
            raise
        return self.state

    def advance(self, loaded: Any) -> None:
        """Give the device a step, and read the one before; then what the guard's policy asks for because of that one.

        Raises guard.DivergenceError, on all ranks, where the policy is to stop.
        """
        launched = self.step(loaded)
        self.settle()
        self._pending = launched
        if self.guard.due:
            self._respond(launched.step.index + 1)

    def settle(self) -> None:
        """Read the step under way, if there is one: report what the guard left out, count it, record it.

        Waits for the device. Raises guard.DivergenceError, on all ranks, where the policy is to stop.
        """
        launched, self._pending = self._pending, None
        if launched is None:
            return
        self.heartbeat.beat(self._phase, launched.step.index + 1)
        sums, judged, done = launched.letter.read()
        self._phase = "step"
        anomaly = self.guard.observe(judged)
        if anomaly is not None:
            self._report(launched, anomaly)
        self._account(launched, sums, counts=anomaly is None)
        if launched.probed or self.state.step % self.train.log_every == 0:
            self._record(launched, sums, judged.grad_norm, done)
        self._told = self._told or sums.told > 0
        if sums.written == self.world.size:
            self._publish()

    def _publish(self) -> None:
        """Publish the save under way; collective. Renaming and removing takes rank 0 longer than a step may."""
        self.heartbeat.beat("checkpoint", self.state.step)
        self.store.settle()

    def step(self, loaded: Any) -> Launched:
        """Forward, backward and update for one step, or no update where the guard's verdict is against it.

        Nothing here waits for the device: what the step gave is sent behind it.
        """
        step, engine, progress = loaded.step, self.engine, loaded.step.samples_seen / self.train.total_samples
        engine.freeze_for_now(self.train.frozen_at(progress))
        iterations = schedule.fine_iterations(self.train.fine_iterations, step.index)
        arguments = objectives.call_arguments(self.train, iterations)
        probe = objectives.probes(self.train, self.config.model.architecture, step.index)
        totals = torch.zeros(len(PLACES), dtype=torch.float64, device=self.world.device)
        scored = []
        for batch, keys in zip(loaded.batches, loaded.keys, strict=True):
            self.heartbeat.beat(self._phase, step.index + 1)
            if probe:
                totals[PLACES["coarse"]] += objectives.coarse_loss_sum(engine.module, batch)
            out = engine.forward(batch=batch, **arguments)
            loss, pairs = objectives.loss_sum(out, batch, self.train)
            self.heartbeat.beat(self._phase, step.index + 1)
            engine.backward(loss, step.planned)
            totals[:2] += torch.stack([out.loss_sum.detach().double(), out.num_labels.double()])
            if out.coarse_loss_sum is not None:
                totals[PLACES["coarse"]] += out.coarse_loss_sum.detach()
            totals[PLACES["objective"]] += loss.detach()
            if pairs is not None:
                totals[PLACES["pairs"] : PLACES["correct"] + 1] += torch.stack(pairs[1:])
            scored.append(guard.ScoredPack.of(batch, out.logprobs, keys))
        for name, value in self._host_sums(loaded).items():
            if value:
                totals[PLACES[name]] += value
        self.heartbeat.beat(self._phase, step.index + 1)
        totals = self.world.sum(totals)
        loss, anew = totals[PLACES["objective"]] / max(1, step.planned), schedule.unfreezes(self.train, step)
        engine.step(schedule.learning_rates(self.train, progress), self.guard.verdict(loss, anew))
        return Launched(
            step=step,
            lost=loaded.skipped,
            scored=scored,
            probed=probe,
            frozen=tuple(self.guard.frozen),
            letter=self._mailbox.send(totals, self.guard.judged),
        )

    def _host_sums(self, loaded: Any) -> dict[str, float]:
        """This rank's part of the sums that the host knows."""
        return {
            "wait_seconds": loaded.wait_s,
            "read_seconds": loaded.read_s,
            "decode_seconds": loaded.decode_s,
            "skipped": len(loaded.lost),
            "told": self.notice.received is not None,
            "written": self.store.written,
        }

    def _report(self, launched: Launched, anomaly: guard.Anomaly) -> None:
        """Say on rank 0 which step was left out, why, and whose samples were in it; collective.

        Raises guard.DivergenceError where that was one too many.
        """
        step, policy = launched.step.index + 1, self.train.guard.policy
        ranks = guard.account(launched.scored, self.train.packs_per_step, self.world)
        message = f"step {step}: {anomaly}; samples: {guard.describe(ranks)}"
        if self.writer is not None:
            self.writer.guard({"step": step, "policy": policy, **anomaly.record(), "ranks": ranks})
        self.guard.require_patience(message)
        logger.warning("%s; the step does not count", message)

    def _respond(self, step: int) -> None:
        """What the policy asks for because of the step before `step`, which was given to the device; collective."""
        policy = self.train.guard.policy
        if policy == "roll_back":
            self.settle()  # whatever is wrong with this one too, its update is undone: one rollback is for both
            self._roll_back()
        self.guard.due = False
        part = policy.removeprefix("freeze_")
        if part == policy or part in self.guard.frozen:
            return
        if set(GROUPS) <= {*self.train.freeze, *self.guard.frozen, part}:
            raise guard.DivergenceError(f"step {step}: policy {policy} would leave nothing to train")
        self.engine.freeze(part)
        self.guard.frozen.append(part)
        logger.warning("after step %d: %s is frozen from here on (train.guard.policy)", step, part)

    def _roll_back(self) -> None:
        """Weights, moments and random states of the newest checkpoint; the data since then stays behind."""
        self.heartbeat.beat("checkpoint", self.state.step)
        found, _ = self.store.find()  # after a save under way, however long it takes: the same run again does the same
        if found is None:
            logger.warning("step %d: no checkpoint to roll back to yet", self.state.step)
            return
        self.store.load(self.engine, found, read_state(found))
        logger.warning("step %d: rolled back to the weights of %s; its data is not seen again", self.state.step, found)

    def _account(self, launched: Launched, sums: StepSums, counts: bool) -> None:
        """Move the state past a step that is done; a loss that `counts` enters the mean since the last evaluation."""
        state, step = self.state, launched.step
        state.plan = asdict(step.state)
        if counts:
            loss, count = state.loss_since_evaluation
            new = (sums.objective, sums.pairs) if sums.pairs else (sums.loss, sums.labels)
            state.loss_since_evaluation = [loss + new[0], count + new[1]]
        if sums.skipped:  # the same on all ranks, so that all of them join in
            lost = sum((Counter(part) for part in self.world.gather(dict(launched.lost))), Counter(state.skipped))
            state.skipped = dict(lost)
        self._data.count(step)
        state.samples_by_source = self._data.samples_by_source
        iterations = schedule.fine_iterations(self.train.fine_iterations, step.index)
        flops = step_flops(self.engine.module.config, self.plan, step, self.train.mode, iterations)
        state.flops_seen += flops
        self._clock.count(samples=step.samples, tokens=sum(p.tokens for p in step.packs), flops=flops)

    def _record(self, launched: Launched, sums: StepSums, norm: float, done: float) -> None:
        """The record of the last step that was read."""
        rates = schedule.learning_rates(self.train, self.state.samples_seen / self.train.total_samples)
        rates |= dict.fromkeys((group for group in GROUPS if group in launched.frozen), 0.0)
        with_coarse = launched.probed or self.train.lambda_coarse > 0
        record = {
            "step": self.state.step,
            "samples_seen": self.state.samples_seen,
            "flops_seen": self.state.flops_seen,
            "wall_time_sec": round(self._clock.wall_seconds(), 3),
            **sums.figures(self.train.mode == "coarse_only", with_coarse, self.world.size),
            "grad_norm": norm,
            **{f"lr_{group}": rate for group, rate in rates.items()},
            "fine_iterations": schedule.fine_iterations(self.train.fine_iterations, self.state.step - 1),
            **self._clock.rates(done),
            **self._data.record(),
            "skipped_samples": sum(self.state.skipped.values()),
            **{f"skipped/{reason}": count for reason, count in sorted(self.state.skipped.items())},
            "skipped_steps": self.guard.skipped_steps,
        }
        self.state.last_record = {  # JSON knows no NaN
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        if self.writer is not None:
            self.writer.step(self.state.last_record)

    def _evaluates_at(self, step: int) -> bool:
        return self.evaluate is not None and self.train.eval_every > 0 < step and step % self.train.eval_every == 0

    def _between_steps(self, step: int) -> None:
        """Stop, evaluate and save, where one of them is due after `step`, the last that was given to the device."""
        evaluates = self._evaluates_at(step)
        saves = self.train.checkpoint_every > 0 and step % self.train.checkpoint_every == 0
        if evaluates or saves:
            self.settle()
        if self._told:
            self._stop()
        is_best = self._evaluate() if evaluates else False
        if is_best or saves:
            self._save(is_best)

    def _stop(self) -> None:
        """Save and raise Preempted; collective."""
        self._save(False, last=True)
        raise Preempted(f"stopped as told after step {self.state.step}; the same command goes on from there")

    def _finish(self) -> None:
        self.settle()
        if self._told:
            self._stop()
        is_best = False
        if self.evaluate is not None and self.state.last_evaluation != self.state.step:
            is_best = self._evaluate()
        self._save(is_best, last=True)

    def _evaluate(self) -> bool:
        """Record an evaluation; returns whether it is the best so far.

        Raises Preempted, with a checkpoint and without a record, where a rank was told to stop before it was done.
        """
        self.heartbeat.beat("evaluation", self.state.step)
        with self._clock.paused():
            random_before = random_state()  # evaluating must not change what is trained next
            figures = self._figures()
            set_random_state(random_before)
        if figures is None:
            self._stop()
        state, last = self.state, self.state.last_record
        require_figures(self.config.best_metric, figures)
        score = sum(weight * figures[name] for name, weight in self.config.best_metric.items())
        loss_sum, labels = state.loss_since_evaluation
        known = {key: last.get(key) for key in ("grad_norm", "lr_connector", "lr_dino", "lr_llm")}
        row = {
            "step": state.step,
            "samples_seen": state.samples_seen,
            "flops_seen": state.flops_seen,
            "wall_time_sec": round(self._clock.wall_seconds(), 3),
            "train_loss": loss_sum / labels if labels else None,
            **known,
            "throughput": last.get("throughput_samples_sec"),
            "gpu_mem_gb": last.get("gpu_mem_allocated_gb"),
            **figures,
            "score": score,
        }
        if self.writer is not None:
            self.writer.evaluation(row)
        state.last_evaluation, state.metrics, state.loss_since_evaluation = state.step, figures, [0.0, 0.0]
        self._evaluated = True
        if state.best is not None and score <= state.best["score"]:
            return False
        state.best = {"score": score, "step": state.step, "metrics": figures}
        return True

    def _figures(self) -> dict[str, float] | None:
        """What `evaluate` gives; None where the ranks agreed to stop.

        Raises guard.EvaluationError for what is wrong with the set or the scores.
        """
        try:
            return dict(self.evaluate(self.engine.module, self.state.step, self._before_pack))
        except Interrupted:
            return None
        except ConfigError:
            raise
        except ValueError as error:
            raise guard.EvaluationError(f"evaluation after step {self.state.step}: {error}") from error

    def _before_pack(self) -> None:
        """Before each pack of an evaluation: raises Interrupted, on all ranks, where one of them was told to stop."""
        self.heartbeat.beat("evaluation", self.state.step)
        told = torch.full((), float(self.notice.received is not None), device=self.world.device)
        if self.world.sum(told).item():
            raise Interrupted

    def _save(self, is_best: bool, last: bool = False) -> None:
        """Begin a checkpoint of the last step, once it is read; where one has all this already, no `last` one is made.

        The last one is waited for. Raises CheckpointError, on all ranks, if it cannot be written.
        """
        self.settle()
        self.heartbeat.beat("checkpoint", self.state.step)
        with self._clock.paused():
            self.store.settle()
            if not last or self._evaluated or self.store.saved_step != self.state.step:
                self._account_time()
                self.state.guard = self.guard.state()
                self.store.save(self.engine, self.state, self.config, best=is_best)
                self._evaluated = False
            if last:
                self.store.settle(required_step=self.state.step)

    def _account_time(self) -> None:
        """Wall and device seconds up to now, into the state."""
        now = self._clock.wall_seconds()
        self.state.device_sec += (now - self.state.wall_time_sec) * self.world.size
        self.state.wall_time_sec = now
