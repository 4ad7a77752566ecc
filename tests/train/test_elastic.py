"""A run goes on, on another number of ranks and under another ZeRO stage, as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spawned import run_ranks
from test_engine import STEPS, Toy, make_engine, settings, train_steps, write
from torch import nn

from fvlm.train.checkpoint import CheckpointError
from fvlm.train.engine import Engine, World
from fvlm.train.fragments import Fragment
from fvlm.train.reshape import KINDS, SavedEngine, share
from fvlm.train.schedule import learning_rates
from fvlm.train.zero_config import read_zero_json

ZEROS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3")
DTYPES = ("fp32", "bf16")
HALF = STEPS // 2
NEXT = dict(zip(ZEROS, (*ZEROS[1:], ZEROS[0]), strict=True))
SHIFTED = [(dtype, zero, NEXT[zero]) for dtype in DTYPES for zero in ZEROS]
"""Each stage once as the source and once as the target, in both types."""
ALL_PAIRS = [("fp32", before, after) for before in ZEROS for after in ZEROS]


def regathered(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Whole parameters of each kind, put together from the files alone; Adam's step of each element, too."""
    sizes = json.loads((folder / "engine/engine.json").read_text())["parameters"]
    whole = {kind: {name: torch.full((n,), torch.nan) for name, n in sizes.items()} for kind in (*KINDS, "step")}
    for file in sorted(folder.glob("engine/*.safetensors")):
        tensors, place = load_file(file), 0
        with safe_open(file, framework="pt") as opened:
            pieces = json.loads(opened.metadata()["pieces"])
        for name, start, numel, step in pieces:
            for kind in KINDS:
                whole[kind][name][start : start + numel] = tensors[kind][place : place + numel]
            whole["step"][name][start : start + numel] = step
            place += numel
    return whole


def require_equal(found: dict, expected: dict, what: object) -> None:
    for kind in (*KINDS, "step"):
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            assert torch.equal(found[kind][name], value), (what, kind, name)  # NaN, a gap, is equal to nothing


def deepspeeds_own(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    """Masters, and under stage 3 moments, as DeepSpeed's debugging interface gathers them.

    Under stages 1 and 2 it knows the moments of the first group only.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {kind: {} for kind in KINDS}
    for name, parameter in engine.module.named_parameters():
        found["master"][name] = safe_get_full_fp32_param(parameter).flatten().clone()
        for kind in KINDS[1:] if engine.stage == 3 else ():
            found[kind][name] = safe_get_full_optimizer_state(parameter, kind).flatten().clone()
    return found


def save_all(world: World, folder: Path) -> dict:
    """Trains under every stage in both types, saves half-way, goes on. Returns losses of the second half by case."""
    losses = {}
    for dtype in DTYPES:
        for zero in ZEROS:
            engine = make_engine(world, settings(dtype=dtype), zero)
            train_steps(engine, settings(dtype=dtype), range(HALF))
            write(engine, folder / dtype / zero)
            if engine.stage > 0:
                whole = regathered(folder / dtype / zero)
                for kind, by_name in deepspeeds_own(engine).items():
                    for name, value in by_name.items():
                        assert torch.equal(whole[kind][name], value), (dtype, zero, kind, name)
            losses[dtype, zero] = train_steps(engine, settings(dtype=dtype), range(HALF, STEPS))
    return losses


def resume_all(world: World, cases: list[tuple[str, str, str]], source: Path, target: Path) -> dict:
    """Loads each case, saves it again, goes on. Returns losses and groups by case."""
    found = {}
    for dtype, before, after in cases:
        engine = make_engine(world, settings(dtype=dtype), after)
        engine.load(source / dtype / before)
        write(engine, target / dtype / f"{before}-{after}")
        groups = [
            (group["name"], group["lr"], group["weight_decay"], group["betas"], group["eps"])
            for group in engine._engine.basic_optimizer.param_groups
        ]
        assert engine._engine.global_steps == HALF
        found[dtype, before, after] = (train_steps(engine, settings(dtype=dtype), range(HALF, STEPS)), groups)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of checkpoints of two ranks, losses of the undisturbed second half)."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(save_all, 2, folder)[0]


TOLERANCE = {"fp32": 1e-6, "bf16": 2e-2}
"""Relative, on losses and gradient norms: other ranks sum in another order, and bf16 has eight bits."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((1, SHIFTED), id="one rank"),
        pytest.param((4, SHIFTED), id="four ranks", marks=pytest.mark.slow),
    ],
)
def resumed(request, saved, tmp_path_factory):
    """(cases, folder of what other ranks saved right after loading, their results by rank)."""
    ranks, cases = request.param
    folder = tmp_path_factory.mktemp("resumed")
    return cases, folder, run_ranks(resume_all, ranks, cases, saved[0], folder)


def require_undisturbed(saved: tuple, cases: list, folder: Path, results: list) -> None:
    """The state that `cases` loaded is what was saved, bit for bit; rates, decay and curves are as they were."""
    source, undisturbed = saved
    rates, decay = learning_rates(settings(), HALF / STEPS), settings().weight_decay
    for case in cases:
        dtype, before, after = case
        require_equal(regathered(folder / dtype / f"{before}-{after}"), regathered(source / dtype / before), case)
        for by_rank in results:
            (losses, norms), groups = by_rank[case]
            expected_losses, expected_norms = undisturbed[dtype, before]
            assert losses == pytest.approx(expected_losses, rel=TOLERANCE[dtype]), case
            assert norms == pytest.approx(expected_norms, rel=10 * TOLERANCE[dtype]), case
            expected = [(name, rates[name], wd) for name in ("connector", "dino", "llm") for wd in (decay, 0.0)]
            assert [group[:3] for group in groups] == expected, case
            assert all(group[3:] == ((0.9, 0.999), 1e-8) for group in groups), case


def test_from_two_ranks_to_other_ranks_and_stages(saved, resumed):
    require_undisturbed(saved, *resumed)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_from_every_stage_to_every_stage(saved, tmp_path, ranks):
    require_undisturbed(saved, ALL_PAIRS, tmp_path, run_ranks(resume_all, ranks, ALL_PAIRS, saved[0], tmp_path))


def there_and_back(world: World, source: Path, other: Path) -> list[bool]:
    """Two ranks load what one or four wrote and train on: the same bits as if they had never been away."""
    same = []
    for dtype, before, after in SHIFTED[::2]:
        ends = []
        for folder in (source / dtype / before, other / dtype / f"{before}-{after}"):
            engine = make_engine(world, settings(dtype=dtype), before)
            engine.load(folder)
            train_steps(engine, settings(dtype=dtype), range(HALF, HALF + 1))
            ends.append(engine.snapshot().tensors)
        same.append(all(torch.equal(ends[0][kind], ends[1][kind]) for kind in KINDS))
    return same


def test_there_and_back_again_is_bit_for_bit(saved, resumed):
    for same in run_ranks(there_and_back, 2, saved[0], resumed[1]):
        assert all(same), dict(zip(SHIFTED[::2], same, strict=True))


@pytest.mark.parametrize("zero", ZEROS[1:])
def test_what_a_stage_saves_is_what_torchs_own_optimizer_has(saved, zero):
    """Stage 0 is torch's AdamW on whole parameters; the others sum the same gradients in another order."""
    plain, found = (regathered(saved[0] / "fp32" / name) for name in ("zero0", zero))
    for kind in (*KINDS, "step"):
        for name, value in plain[kind].items():
            torch.testing.assert_close(found[kind][name], value, rtol=1e-4, atol=1e-8, msg=f"{kind} {name}")
    assert all((value == HALF).all() for value in found["step"].values())


class Frozen(Toy):
    """Only the connector and the LLM train."""

    def __init__(self):
        super().__init__()
        self.dino.requires_grad_(False)


def run_frozen(world: World, folder: Path) -> list[str]:
    """Messages of loads between engines with and without a frozen part."""
    messages = []
    contents, origin = read_zero_json("zero2")
    engines = {kind: Engine(kind(), settings(), contents, origin, world) for kind in (Toy, Frozen)}
    for kind, engine in engines.items():
        write(engine, folder / kind.__name__)
    engines[Frozen].load(folder / "Frozen")
    for engine, other in ((engines[Toy], "Frozen"), (engines[Frozen], "Toy")):
        try:
            engine.load(folder / other)
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def test_frozen_parameters_are_left_alone_and_another_set_is_refused_by_name(tmp_path):
    missing, extra = run_ranks(run_frozen, 1, tmp_path)[0]
    assert "of other trained parameters: dino.0.bias is not in the checkpoint; dino.0.weight is not" in missing
    assert "dino.0.bias is not trained now" in extra


def cut(folder: Path, change) -> None:
    """Rewrite the file of rank 1 with changed pieces and tensors."""
    file = folder / "engine/rank-00001.safetensors"
    with safe_open(file, framework="pt") as opened:
        pieces = json.loads(opened.metadata()["pieces"])
    pieces, tensors = change(pieces, load_file(file))
    save_file(tensors, file, {"pieces": json.dumps(pieces)})


def drop_last(pieces, tensors):
    return pieces[:-1], {kind: tensor[: -pieces[-1][2]].clone() for kind, tensor in tensors.items()}


def repeat_last(pieces, tensors):
    again = {kind: torch.cat([tensor, tensor[-pieces[-1][2] :]]) for kind, tensor in tensors.items()}
    return [*pieces, pieces[-1]], again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_last, "misses elements"),
        (repeat_last, "twice"),
        (lambda pieces, tensors: (pieces[:-1], tensors), "expected"),
        (lambda pieces, tensors: ([*pieces[:-1], ["nobody", *pieces[-1][1:]]], tensors), "unknown parameters"),
    ],
)
def test_what_is_not_whole_is_refused(saved, tmp_path, change, message):
    shutil.copytree(saved[0] / "fp32/zero2", tmp_path / "copy")
    SavedEngine(tmp_path / "copy").__exit__()
    cut(tmp_path / "copy", change)
    with pytest.raises(CheckpointError, match=message):
        SavedEngine(tmp_path / "copy")


def test_a_share_is_even_and_whole():
    parameters = [nn.Parameter(torch.arange(n, dtype=torch.float32)) for n in (7, 1, 12)]
    kept = [Fragment(name=str(i), start=0, numel=p.numel(), master=p, offset=0, group={}) for i, p in
            enumerate(parameters)]  # fmt: skip
    for size in range(1, 25):
        parts = [share(kept, rank, size) for rank in range(size)]
        assert max(sum(f.numel for f in part) for part in parts) <= 20 // size + 1
        joined = torch.cat([f.of(f.master) for part in parts for f in part])
        assert torch.equal(joined, torch.cat([p.detach() for p in parameters]))
