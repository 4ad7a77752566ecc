"""One step of a run again, from the newest checkpoint before it, to look inside; nothing is written to the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fvlm.config import RunConfig
from fvlm.data.plan import PlanState
from fvlm.schema import ConfigError
from fvlm.train import guard
from fvlm.train.build import load_data, load_model, open_loader
from fvlm.train.checkpoint import CheckpointStore
from fvlm.train.engine import Engine, World
from fvlm.train.heartbeat import Heartbeat
from fvlm.train.loop import Trainer
from fvlm.train.preemption import Notice
from fvlm.train.reference import TRAINING, reference_logprobs
from fvlm.train.start import find_start, seed_everything
from fvlm.train.zero_config import resolve_dtype, zero_stage

MOST = 10
"""Gradients, and modules whose output is not finite, that a report names."""

logger = logging.getLogger(__name__)


def replay(
    config: RunConfig, zero: tuple[dict, str], world: World, step: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train on from the newest valid checkpoint before `step`, numbered as in `metrics.jsonl`, and watch that step.

    Collective. Returns a report (`text` shows what it holds) and the step's whole gradient by parameter, before
    clipping, fp32 on the device, on every rank. Raises ConfigError where the plan has no such step, and for whatever
    keeps a run from being resumed.
    """
    data = load_data(config)
    dtype = resolve_dtype(config.train, world.device.type == "cuda")
    store = CheckpointStore(config.folder / "checkpoints", world, before=step)
    state, checkpoint = find_start(config, data.identity(), world, zero_stage(zero[0], dtype), dtype, store)
    model = load_model(config, len(data.tokenizer), checkpoint)
    engine = Engine(model, config.train, *zero, world)
    seed_everything(config.train.seed, world.rank)
    if checkpoint is not None:
        store.load(engine, checkpoint, state)
    logger.info("from step %d (%s) to step %d", state.step, checkpoint or "the start of the run", step)
    unwatched = Heartbeat(world.rank, world.size)
    reference = None
    if config.train.objective == "dpo":
        reference = reference_logprobs(config, {TRAINING: data}, world, True, unwatched)[TRAINING]
    trainer = Trainer(engine, config, data.plan, state, store, None, None, unwatched, Notice())
    for loaded in open_loader(config, data, world, PlanState(**state.plan), reference):
        if loaded.step.index + 1 < step:
            trainer.advance(loaded)
            continue
        with Inspector(engine) as inspector:
            launched = trainer.step(loaded)
        sums, judged, _ = launched.letter.read()
        report = {
            "step": step,
            "checkpoint": str(checkpoint) if checkpoint else None,
            "train_loss": sums.train_loss,
            "grad_norm": judged.grad_norm,
            "skipped": bool(judged.left_out),
            "limits": {"loss": judged.loss_limit, "grad_norm": judged.grad_norm_limit},
            "recorded": recorded(config, step) if world.is_main else None,
            "ranks": _ranks(launched.scored, config.train.packs_per_step, world),
            **inspector.report(),
        }
        return report, inspector.gradients
    raise ConfigError(f"--step {step}: this run's plan ends before it, or the step is below 1")


def recorded(config: RunConfig, step: int) -> dict[str, Any] | None:
    """The step's line in the run's `metrics.jsonl`, or None."""
    path = config.folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [record for record in map(json.loads, lines) if record["kind"] == "step" and record["step"] == step]
    return {name: found[-1][name] for name in ("train_loss", "grad_norm")} if found else None


def _ranks(scored: Sequence[guard.ScoredPack], packs_per_step: int, world: World) -> list[dict[str, Any]]:
    packs = range(world.rank, packs_per_step, world.size)
    losses = [dict(guard.sample_losses([one])) for one in scored]
    return world.gather({"rank": world.rank, "packs": dict(zip(packs, losses, strict=True))})


class Inspector:
    """While its `with` block lasts, adds up every parameter's gradient and notes modules whose output is not finite."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._groups = {name: group for group, named in engine.module.param_groups().items() for name, _ in named}
        self.gradients: dict[str, Tensor] = {}
        """float32, in the parameters' shapes; of all ranks once the block has ended."""
        self._broken: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Inspector:
        module = self._engine.module
        for name, parameter in module.named_parameters():
            if name in self._groups:
                self._handles.append(parameter.register_hook(partial(self._add, name)))
        for name, part in module.named_modules():
            self._handles.append(part.register_forward_hook(self._check(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for name, parameter in self._engine.module.named_parameters():
            if name in self._groups:  # the same on all ranks, whoever had no gradient
                shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps a parameter in pieces
                empty = torch.zeros(shape, device=self._engine.world.device)
                self.gradients[name] = self._engine.world.sum(self.gradients.get(name, empty))
                self.gradients[name] /= self._engine.world.size  # what DeepSpeed's average makes of the ranks' sums

    def report(self) -> dict[str, Any]:
        """Norms by group, the largest gradients, and what is not finite; the same on all ranks."""
        norms = {name: float(gradient.double().norm()) for name, gradient in self.gradients.items()}
        groups: dict[str, float] = {}
        for name, norm in norms.items():
            groups[self._groups[name]] = groups.get(self._groups[name], 0.0) + norm**2
        broken = [name for name, flag in self._broken.items() if bool(flag)]
        largest = sorted(norms, key=lambda name: -norms[name] if norms[name] == norms[name] else -torch.inf)
        return {
            "group_norms": {group: total**0.5 for group, total in groups.items()},
            "largest": [
                {"name": name, "norm": norms[name], "largest": float(self.gradients[name].abs().max())}
                for name in largest[:MOST]
            ],
            "not_finite": {
                "outputs": self._engine.world.gather(broken[:MOST]),
                "gradients": [name for name in norms if not bool(self.gradients[name].isfinite().all())],
            },
        }

    def _add(self, name: str, gradient: Tensor) -> None:
        found = gradient.detach().float()
        self.gradients[name] = self.gradients[name] + found if name in self.gradients else found.clone()

    def _check(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            for tensor in _tensors(output):
                flag = ~torch.isfinite(tensor.detach()).all()
                self._broken[name] = self._broken[name] | flag if name in self._broken else flag

        return hook


def _tensors(output: Any) -> list[Tensor]:
    """Floating-point tensors of a module's output, whatever holds them."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return _tensors(list(output.values()))
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in _tensors(part)]
    return _tensors(vars(output)) if hasattr(output, "__dict__") else []


def text(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    known = report["recorded"]
    lines = [
        f"step {report['step']}, replayed from {report['checkpoint'] or 'the start of the run'}",
        f"loss {report['train_loss']!r}, gradient norm {report['grad_norm']!r}"
        + (", left out by the guard" if report["skipped"] else ""),
        f"recorded: loss {known['train_loss']!r}, gradient norm {known['grad_norm']!r}" if known else "not recorded",
        "gradient norm by group: " + ", ".join(f"{name} {norm:.6g}" for name, norm in report["group_norms"].items()),
        "largest gradients:",
        *(f"  {one['name']}: norm {one['norm']:.4g}, largest {one['largest']:.4g}" for one in report["largest"]),
    ]
    for rank in report["ranks"]:
        for pack, losses in rank["packs"].items():
            shown = ", ".join(f"{key} {loss:.4f}" for key, loss in losses.items())
            lines.append(f"rank {rank['rank']}, pack {pack} of the step: {shown or 'no samples'}")
    broken = report["not_finite"]
    for rank, names in enumerate(broken["outputs"]):
        if names:
            lines.append(
                f"not finite on rank {rank}, first modules: {', '.join(name or 'the model' for name in names)}"
            )
    if broken["gradients"]:
        more = len(broken["gradients"]) - MOST
        lines.append(
            f"gradients that are not finite: {', '.join(broken['gradients'][:MOST])}"
            + (f", and {more} more" if more > 0 else "")
        )
    return "\n".join(lines)
