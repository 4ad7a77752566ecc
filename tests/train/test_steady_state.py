"""In steady steps nothing of ours makes the host wait for the device; a step is read while the next one runs."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch
from spawned import run_ranks

from benchmarks.counters import SteadyState
from fvlm.config import load_config
from fvlm.train.engine import World
from fvlm.train.guard import Judged, ScoredPack
from fvlm.train.heartbeat import LIMITS, Heartbeat
from fvlm.train.loop import Trainer
from fvlm.train.readings import PLACES, Letter, Mailbox
from fvlm.train.zero_config import read_zero_json

STEADY = range(4, 7)
"""Steps that are counted, once everything has run for the first time."""
PACKS = 2
"""A step."""
ENGINE = {
    "zero0": {"deepspeed/runtime/utils.py"},  # to clip
    "zero2": {"deepspeed/runtime/utils.py"},  # to clip, and to look for what is not finite
    # the same; and a pass that is unlike the one before, as the probe's is, is compared with other ranks'
    "zero3": {"deepspeed/runtime/utils.py", "deepspeed/runtime/zero/utils.py", "deepspeed/runtime/zero/stage3.py"},
}
"""Where DeepSpeed (0.19.8) itself waits, in fp32."""


def configure(shards: Path, out: Path, *overrides: str):
    settings = [f"data.train=[{shards / 'train'}]", "data.val=[]", "train.total_samples=96", "train.checkpoint_every=0"]
    return load_config("tiny_test", [*settings, "train.probe_every=2", f"out={out}", *overrides])


def run_counted(world: World, shards: Path, out: Path, cases: list[tuple[str, str]]) -> dict:
    """For each ZeRO stage and mode: where steady steps would wait on CUDA, recompilations, and how much is kept."""
    from launch.train import train

    found, advance = {}, Trainer.advance
    for zero, mode in cases:
        counted, kept = SteadyState("cpu"), []

        def advance_counted(trainer, loaded, counted=counted, kept=kept):
            if loaded.step.index + 1 not in STEADY:
                return advance(trainer, loaded)
            packs = [thing for thing in gc.get_objects() if isinstance(thing, ScoredPack)]
            kept.append([sum(x.untyped_storage().nbytes() - x.nbytes for x in pack[:4]) for pack in packs])
            del packs
            with counted:
                return advance(trainer, loaded)

        with patch.object(Trainer, "advance", advance_counted):
            train(configure(shards, out / f"{zero}-{mode}", f"train.mode={mode}"), read_zero_json(zero), world)
        syncs = counted.host_syncs
        found[zero, mode] = dict(syncs.ours), dict(syncs.engine), counted.recompilations, kept
    return found


def require_steady(results: list[dict]) -> None:
    for found in results:
        for (zero, mode), (ours, engine, recompilations, kept) in found.items():
            assert ours == {}, (zero, mode)
            assert engine, (zero, mode)  # or nothing was counted
            assert {where.split(":")[0] for where in engine} <= ENGINE[zero], (zero, mode)
            assert recompilations == 0, (zero, mode)
            micro_batches = PACKS // len(results)  # of the one step under way, each without its pack's memory
            assert kept == [[0] * micro_batches] * len(STEADY), (zero, mode)


def test_steady_steps_do_not_wait_and_keep_one_step(shards, tmp_path):
    require_steady(run_ranks(run_counted, 1, shards, tmp_path, [("zero2", "coarse_fine")]))


@pytest.mark.slow
def test_nor_do_they_in_other_stages_and_modes(shards, tmp_path):
    cases = [("zero0", "coarse_fine"), ("zero2", "coarse_only"), ("zero3", "coarse_fine")]
    require_steady(run_ranks(run_counted, 2, shards, tmp_path, cases))


def run_in_order(world: World, shards: Path, out: Path) -> list[str]:
    """What happened in which order: steps given to the device (s1), read (r1), evaluated (e1), saved (c1)."""
    from launch.train import train

    events: list[str] = []
    originals = Trainer.step, Letter.read, Trainer._figures, Trainer._save

    def step(trainer, loaded):
        launched = originals[0](trainer, loaded)
        events.append(f"s{loaded.step.index + 1}")
        return launched

    def read(letter):
        events.append(f"r{1 + sum(event[0] == 'r' for event in events)}")
        return originals[1](letter)

    def figures(trainer):
        events.append(f"e{trainer.state.step}")
        return originals[2](trainer)

    def save(trainer, *args, **kwargs):
        originals[3](trainer, *args, **kwargs)
        events.append(f"c{trainer.state.step}")

    overrides = [
        "train.checkpoint_every=4",
        "train.eval_every=3",
        f"data.val=[{shards / 'val'}]",
        "evaluation.tasks=[]",
    ]
    overrides += ["best_metric={loss_fine: 1.0}"]  # falls: only the first evaluation is the best
    with (
        patch.object(Trainer, "step", step),
        patch.object(Letter, "read", read),
        patch.object(Trainer, "_figures", figures),
        patch.object(Trainer, "_save", save),
    ):
        train(configure(shards, out, *overrides), read_zero_json("zero2"), world)
    return events


def test_a_step_is_read_behind_the_next_or_before_what_needs_it(shards, tmp_path):
    (events,) = run_ranks(run_in_order, 1, shards, tmp_path)
    shown = " ".join(events)
    assert shown.startswith("s1 s2 r1 s3 r2 r3 e3 c3 s4 r4 c4 s5 s6 r5 r6 e6 "), shown
    last = max(int(event[1:]) for event in events if event[0] == "s")
    assert shown.endswith(f"c{last}")
    assert [event for event in events if event[0] == "r"] == [f"r{step}" for step in range(1, last + 1)]


def test_a_step_that_hangs_on_the_device_is_found_by_who_reads_it(monkeypatch):
    class Hanging:
        def read(self):
            time.sleep(1.5)
            raise TimeoutError

    class Pending:
        letter = Hanging()
        step = type("Step", (), {"index": 6})

    ended: list[str] = []
    monkeypatch.setattr(Heartbeat, "_end", lambda self, reason: ended.append(reason) or self._stopped.set())
    trainer = object.__new__(Trainer)
    trainer._pending, trainer._phase = Pending(), "step"
    with Heartbeat(0, 1, LIMITS | {"step": 0.3}) as trainer.heartbeat:
        trainer.heartbeat.beat("step", 8)  # the next one, given to the device meanwhile
        with pytest.raises(TimeoutError):
            trainer.settle()
    assert len(ended) == 1
    assert "in phase 'step' of step 7" in ended[0]


def test_publishing_between_steps_has_the_time_of_a_checkpoint():
    """Rank 0 renames, and removes an old one, while the others wait for it."""
    published = []
    sums, judged = SimpleNamespace(told=0, written=1), SimpleNamespace(grad_norm=1.0)
    trainer = object.__new__(Trainer)
    trainer.heartbeat, trainer._phase, trainer._told = Heartbeat(0, 1), "step", False
    trainer.world, trainer.state, trainer.train = SimpleNamespace(size=1), Mock(step=1), Mock(log_every=2)
    trainer.guard, trainer._account = Mock(observe=lambda _: None), Mock()
    trainer.store = Mock(settle=lambda: published.append(trainer.heartbeat._phase))
    trainer._pending = Mock(letter=Mock(read=lambda: (sums, judged, 0.0)), step=Mock(index=0), probed=False)
    trainer.settle()
    assert published == ["checkpoint"]


def send_three(device: torch.device) -> list[tuple[float, float, float]]:
    """(a sum, a loss, whether it was left out) of three steps, each read once the next one was sent."""
    mailbox, letters, found = Mailbox(device), [], []
    for step in range(4):
        totals = torch.full((len(PLACES),), float(step), dtype=torch.float64, device=device)
        judged = torch.full((len(Judged._fields),), 10.0 + step, dtype=torch.float64, device=device)
        letters.append(mailbox.send(totals, judged))
        totals += 100  # what comes later on the device does not reach it
        if step:
            sums, verdict, _ = letters[step - 1].read()
            found.append((sums.written, verdict.loss, verdict.left_out))
    return found


def test_numbers_of_two_steps_do_not_mix():
    assert send_three(torch.device("cpu")) == [(step, 10 + step, 10 + step) for step in range(3)]


@pytest.mark.gpu
def test_numbers_arrive_from_a_gpu_without_a_wait_before_they_are_read():
    device = torch.device("cuda")
    assert send_three(device) == [(step, 10 + step, 10 + step) for step in range(3)]
    mailbox = Mailbox(device)
    totals = torch.ones(len(PLACES), dtype=torch.float64, device=device)
    judged = torch.ones(len(Judged._fields), dtype=torch.float64, device=device)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # cycles
    letter = mailbox.send(totals, judged)
    assert not letter._arrived.query()
    assert letter.read()[0].loss == 1
