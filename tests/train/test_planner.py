"""The planner against what code and engine really take: bytes saved for the backward pass, and DeepSpeed's tensors."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from spawned import run_ranks

from fvlm.config import load_config
from fvlm.data.capacities import Capacities
from fvlm.kernels.query_attention.reference import query_attention_torch
from fvlm.kernels.varlen_attention.reference import varlen_attention_padded
from fvlm.model import build_model, tiny_config
from fvlm.model.configuration import PRESETS, preset_config
from fvlm.model.flops import flops_per_sample
from fvlm.model.packed import SampleRows, assemble
from fvlm.schema import ConfigError
from fvlm.train import planner
from fvlm.train.dry_run import dry_run, meta_model
from fvlm.train.engine import Engine
from fvlm.train.gpus import GIB, GPUS, find_gpu
from fvlm.train.live_memory import LiveMemory, saved_bytes
from fvlm.train.memory import Parameters, count_parameters, engine_memory, host_memory
from fvlm.train.optimizer import freeze
from fvlm.train.preflight import worst_case_pack
from fvlm.train.work_model import SAMPLES, step_time
from fvlm.train.zero_config import read_zero_json
from fvlm.train_config import CheckpointingConfig

VOCABULARY = 2048
SMALL = Capacities(frames=12, tokens=256, visual=24, coarse=248, samples=4, labels=192, max_seqlen=64)
ALL, LLM, HALF = (CheckpointingConfig(encoder=e, llm=x) for e, x in ((1.0, 1.0), (0.0, 1.0), (0.5, 0.5)))
NONE = CheckpointingConfig()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def full_pack(geometry, capacities):
    """Samples as long as allowed whose looks come near their end, so that torch's padded attention pads nothing."""
    count, length = capacities.tokens // capacities.max_seqlen, capacities.max_seqlen
    looks = capacities.visual // count
    rows = []
    for index in range(count):
        frame = np.full(length, -1)
        first = index * looks + np.arange(looks)
        frame[length - 2 - looks : length - 2] = first * capacities.frames // capacities.visual
        has_loss = (frame < 0) & (np.arange(length) > 0) & (np.arange(length) <= capacities.labels // count)
        rows.append(SampleRows(token_ids=np.arange(length), frame=frame, has_loss=has_loss))
    sizes = {"T": capacities.tokens, "V": looks * count, "C": capacities.coarse, "S": count, "K": capacities.labels}
    frames = torch.zeros((capacities.frames, 3, geometry.image_size, geometry.image_size), dtype=torch.uint8)
    return assemble(rows, frames, sizes, length)


@pytest.fixture
def as_on_other_devices(monkeypatch):
    """The CPU has torch back ends of its own, which keep less: these are the ones that a dry run goes through."""
    monkeypatch.setattr(
        "fvlm.kernels.varlen_attention.flash.varlen_attention_cpu",
        lambda q, key, value, cu_seqlens: varlen_attention_padded(
            q, key, value, cu_seqlens, int(cu_seqlens.diff().max())
        ),
    )
    monkeypatch.setattr("fvlm.kernels.query_attention.op.query_attention_cpu", query_attention_torch)


def saved_in_a_real_run(geometry, capacities, checkpointing, dtype) -> int:
    """Bytes that autograd keeps for the backward pass of a forward pass on the CPU, weights left out."""
    torch.manual_seed(0)
    model = build_model(geometry).to(dtype).train()
    if checkpointing != NONE:
        model.gradient_checkpointing_enable(encoder=checkpointing.encoder, llm=checkpointing.llm)
    saved = []
    batch = full_pack(geometry, capacities)
    tensors = [x for x in vars(batch).values() if isinstance(x, torch.Tensor)]

    def keep(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(batch=batch)
    assert out.loss_sum.isfinite()
    return saved_bytes([*saved, *tensors], [*model.parameters(), *model.buffers()])


def test_published_geometries(shared_fixtures):
    for preset, name in {"135m": "135M", "360m": "360M", "1b7": "1.7B"}.items():
        ours = preset_config(preset).llm_config.to_dict()
        theirs = json.loads((shared_fixtures / f"configs/SmolLM2-{name}-Instruct__config.json").read_text())
        same = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        same += ["vocab_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"]
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
        assert ours["rope_parameters"]["rope_theta"] == theirs["rope_theta"]
    theirs = json.loads((shared_fixtures / "configs/dinov2-small__config.json").read_text())
    ours = preset_config("1b7").vision_config.to_dict()
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "image_size", "patch_size"):
        assert ours[key] == theirs[key], key
    with pytest.raises(ValueError, match="one of 135m, 360m, 1b7"):
        preset_config("7b")


def test_numbers_of_parameters():
    assert {name: round(planner.parameters_of(name).all / 1e6) for name in PRESETS} == {
        "135m": 157, "360m": 385, "1b7": 1735,
    }  # fmt: skip
    frozen = count_parameters(meta_model(tiny_config(VOCABULARY), torch.float32, freeze=("llm",)))
    assert frozen.trained < frozen.all


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpointing", [NONE, LLM, ALL, HALF], ids=["none", "llm", "all", "half"])
def test_activations_are_what_autograd_saves(checkpointing, dtype, as_on_other_devices):
    geometry = tiny_config(VOCABULARY)
    real = saved_in_a_real_run(geometry, SMALL, checkpointing, DTYPES[dtype])
    dry = dry_run(geometry, SMALL, checkpointing=checkpointing, dtype=DTYPES[dtype], backend="torch")
    assert dry.activations == pytest.approx(real, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpointing", [NONE, ALL], ids=["none", "all"])
@pytest.mark.parametrize("preset", ["135m", "360m"])
def test_activations_of_the_real_geometry(preset, checkpointing, dtype, as_on_other_devices):
    geometry = preset_config(preset)
    capacities = Capacities(frames=4, tokens=128, visual=8, coarse=124, samples=2, labels=64, max_seqlen=64)
    real = saved_in_a_real_run(geometry, capacities, checkpointing, DTYPES[dtype])
    dry = dry_run(geometry, capacities, checkpointing=checkpointing, dtype=DTYPES[dtype], backend="torch")
    assert dry.activations == pytest.approx(real, rel=0.05)


def test_kernels_save_less_than_torch():
    geometry, capacities = tiny_config(VOCABULARY), replace(SMALL, visual=96)
    torchs, tritons = (dry_run(geometry, capacities, backend=name) for name in ("torch", "triton"))
    assert tritons.activations < torchs.activations
    assert {"kernels", "logits"} & set(tritons.peak) or tritons.peak["temporaries"]


def test_peak_is_not_below_what_the_backward_pass_waits_for():
    dry = dry_run(tiny_config(VOCABULARY), SMALL)
    assert dry.total >= dry.activations
    less = dry_run(tiny_config(VOCABULARY), SMALL, checkpointing=ALL)
    assert less.activations < 0.5 * dry.activations
    assert less.num_ops > dry.num_ops


def test_a_frozen_encoder_leaves_nothing_behind():
    whole, frozen = (dry_run(tiny_config(VOCABULARY), SMALL, freeze=groups) for groups in ((), ("dino",)))
    assert frozen.activations < whole.activations


def test_live_memory_counts_a_storage_once_until_it_is_freed():
    memory = LiveMemory()
    with memory:
        x = torch.zeros(100)
        view = x[:10].view(2, 5)
        assert memory.live.total() == 400
        with memory.within("else"):
            y = x * 2
        assert memory.live == {"other": 400, "else": 400}
        del x
        assert memory.live.total() == 800  # the view holds it
        del view, y
        assert (memory.live.total(), memory.peak.total()) == (0, 800)


def engine_bytes(world, name, dtype):
    """(bytes after a backward pass, bytes after the step) of everything of float type that a model's engine holds."""
    train = replace(load_config("tiny_test").train, packs_per_step=world.size, dtype=dtype)
    zero, origin = read_zero_json(name)
    zero["zero_optimization"] |= {"reduce_bucket_size": 1000}  # counted apart
    if name == "zero3":
        zero["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000}
    model = build_model(tiny_config(VOCABULARY)).train()
    batch, buffers = worst_case_pack(model.config, SMALL), {x.untyped_storage()._cdata for x in model.buffers()}
    engine, counts = Engine(model, train, zero, origin, world), []
    for _ in range(2):
        engine.backward(engine.forward(batch=batch).loss_sum, 100)
        counts = [floats(buffers)]
        engine.step({"connector": 1e-3, "dino": 1e-3, "llm": 1e-3})
        counts.append(floats(buffers))
    return counts


def floats(beside: set[int]) -> int:
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not x.is_meta and x.is_floating_point()]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(size for key, size in storages.items() if key not in beside)


RARE = [pytest.param(*each, marks=pytest.mark.slow) for each in product(["zero1", "zero2"], DTYPES)]


@pytest.mark.parametrize(("name", "dtype"), [("zero3", "bf16"), *RARE])
def test_weights_gradients_and_optimizer_are_deepspeeds(name, dtype):
    parameters = count_parameters(meta_model(tiny_config(VOCABULARY), torch.float32))
    expected = engine_memory(parameters, read_zero_json(name)[0], 2, dtype)
    lasting = expected.weights + expected.masters + expected.moments
    lasting += expected.gradients if name != "zero2" else 0  # ZeRO-2 gives its sums up at every step
    kept = 2 * parameters.trained if name == "zero1" else 0  # the bf16 gradients themselves
    for after_backward, after_step in run_ranks(engine_bytes, 2, name, dtype):
        assert after_step == pytest.approx(lasting, rel=0.02)
        assert after_backward == pytest.approx(expected.state + kept, rel=0.02)


def test_sharing_and_offload():
    parameters = Parameters(all=1100, trained=1000, largest=100)
    alone, shared = (engine_memory(parameters, read_zero_json("zero2")[0], n, "bf16") for n in (1, 4))
    assert (alone.weights, alone.masters, alone.moments, alone.gradients) == (2200, 4000, 8000, 4000)
    assert (shared.weights, shared.masters, shared.moments, shared.gradients) == (2200, 1000, 2000, 1000)
    offloaded = engine_memory(parameters, read_zero_json("zero2_offload")[0], 1, "bf16")
    assert (offloaded.state, offloaded.host) == (2200, 22_000)
    plain = engine_memory(parameters, read_zero_json("zero0")[0], 4, "fp32")
    assert (plain.weights, plain.masters, plain.moments) == (4400, 0, 8000)


def copied_to_the_host(world, cases) -> list[int]:
    """Bytes of the tensors that a checkpoint's copy has on this rank, by case."""
    found = []
    for name, dtype in cases:
        train = replace(load_config("tiny_test").train, packs_per_step=world.size, dtype=dtype, freeze=("dino",))
        model = build_model(tiny_config(VOCABULARY)).train()
        freeze(model, train.frozen)
        shot = Engine(model, train, *read_zero_json(name), world).snapshot()
        tensors = [*shot.tensors.values(), *(shot.weights.state.values() if shot.weights else ())]
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
        found.append(sum(storages.values()))
    return found


def test_a_checkpoints_copy_takes_the_host_memory_that_was_predicted():
    cases = [("zero0", "fp32"), ("zero2", "bf16"), ("zero3", "bf16")]
    measured = run_ranks(copied_to_the_host, 2, cases)
    parameters = count_parameters(meta_model(tiny_config(VOCABULARY), torch.float32, freeze=("dino",)))
    for (name, dtype), *by_rank in zip(cases, *measured, strict=True):
        engine = engine_memory(parameters, read_zero_json(name)[0], 2, dtype)
        found = host_memory(parameters, engine, 2, dtype, buffers=1e9)  # training is the worse moment
        copies = [size for part, size in found.items() if part.startswith("checkpoint's copy")]
        assert sum(by_rank) == pytest.approx(sum(copies), rel=1e-3), (name, dtype)
        states = 12 * parameters.trained / 2
        assert by_rank[1] == pytest.approx(states, rel=0.02), (name, dtype)


def test_the_worse_moment_of_the_host_is_loading_or_training():
    parameters = Parameters(all=1100, trained=1000, largest=100)
    engine = engine_memory(parameters, read_zero_json("zero2_offload")[0], 4, "bf16")
    assert host_memory(parameters, engine, 4, "bf16", buffers=50.0) == {
        "offloaded optimizer": 22_000, "checkpoint's copy, states": 12_000, "checkpoint's copy, weights": 2200,
        "packs of the loader": 200,
    }  # fmt: skip
    plain = engine_memory(parameters, read_zero_json("zero2")[0], 8, "bf16")
    assert host_memory(parameters, plain, 8, "bf16", buffers=50.0) == {"models, while loading": 4 * 1100 * 8}


def test_packs_on_the_host_are_as_many_as_the_loader_holds():
    asked = request(model="135m", ranks=2, step_tokens=4 * 16384)
    capacities = planner.capacities_for(SAMPLES["stage2"], 16384)
    found = planner.host_of(asked, engine_memory(planner.parameters_of("135m"), {}, 2, "bf16"), capacities)
    frames = capacities.frames * 3 * 224**2
    assert found["packs of the loader"] == pytest.approx(2 * (2 * 8 + 3 * 2 + 1) * frames, rel=0.05)
    assert load_config("stage2_135m").data.num_workers == planner.WORKERS


def request(**changes) -> planner.Request:
    given = {"model": "tiny", "stage": "stage2", "gpu": GPUS["rtx5090"], "ranks": 1, "limit": 30.0, "mfu": 0.3}
    return planner.Request(**(given | changes))


OF_TINY = {name: cache(getattr(planner, name).__wrapped__) for name in ("parameters_of", "run_dry")}
"""What takes long, kept from test to test: of the tiny model, by whatever name it goes."""


@pytest.fixture
def tiny_as_a_model(monkeypatch):
    geometry = tiny_config(VOCABULARY)
    monkeypatch.setattr(planner, "geometry_of", lambda model: geometry)
    monkeypatch.setattr(planner, "TOKENS", (1024, 256))
    monkeypatch.setattr(planner, "MEASURED_AT", (256, 1024))
    monkeypatch.setattr(planner, "CONTEXT_GIB", 0.0)
    monkeypatch.setattr(planner, "NCCL_GIB", 0.0)
    for name, function in OF_TINY.items():
        monkeypatch.setattr(planner, name, lambda model, *rest, of=function: of("tiny", *rest))


def test_a_choice_fits_and_less_memory_costs_speed(tiny_as_a_model):
    free = planner.propose(request())
    assert (free.zero, free.checkpointing, free.capacities.tokens) == ("zero1", NONE, 1024)
    tight = planner.propose(request(limit=0.8 * free.total / GIB))
    assert tight.total <= 0.8 * free.total
    assert (tight.zero, tight.checkpointing, tight.capacities.tokens) != (free.zero, NONE, 1024)
    assert planner.propose(request(limit=1e-4)) is None


def test_what_the_machines_own_memory_cannot_hold_is_not_proposed(tiny_as_a_model):
    asked = request(ranks=2)
    free = planner.propose(asked)
    needed = sum(free.host.values()) / GIB
    assert planner.propose(replace(asked, host_limit=1.01 * needed)).zero == free.zero
    tight = planner.propose(replace(asked, host_limit=0.99 * needed))
    assert tight is None or sum(tight.host.values()) < 0.99 * needed * GIB
    assert planner.propose(replace(asked, host_limit=1e-4)) is None


def test_a_summary_says_what_is_assumed(tiny_as_a_model):
    asked = request(price=2.0)
    found = planner.summary(asked, planner.propose(asked))
    assert found["predicted"] is True
    assert found["utilisation"] == {"value": 0.3, "origin": "measured"}
    assert found["usd_per_gpu_hour"] == {"value": 2.0, "origin": "given"}
    assert found["usd"] == pytest.approx(2 * found["gpu_hours"], abs=0.02)
    assert found["hours"] == pytest.approx(1e6 / found["samples_per_second"] / 3600, rel=0.02)
    assert found["memory_total_gib"] == pytest.approx(sum(found["memory_gib"].values()), abs=0.02)
    json.dumps(found)


def test_time_of_a_step_by_hand():
    geometry, sample, gpu = preset_config("135m"), SAMPLES["stage2"], GPUS["h100"]
    parameters = Parameters(all=10**8, trained=10**8, largest=10**7)
    common = {"tokens": 8192, "micro_batches": 2, "ranks": 4, "checkpointing": ALL, "num_ops": 0, "mfu": 0.5}
    found = step_time(geometry, parameters, sample, gpu, zero=read_zero_json("zero2")[0], **common)
    flops = flops_per_sample(geometry, sample, recompute=(1.0, 1.0))
    samples = 0.97 * 8192 / sample.tokens
    blocks = flops.encoder + flops.coarse_llm + flops.fine_llm
    assert 0.85 * blocks < flops.recomputed < blocks  # without the last product of each layer, and what is no block
    work = 2 * samples * (3 * flops.forward + flops.recomputed)
    assert found.compute == pytest.approx(work / (0.5 * 989e12))
    assert found.communication == pytest.approx(0.75 * 1e8 * (2 * 4 + 2) / (0.7 * 450e9))
    assert found.samples == pytest.approx(samples * 8)
    offloaded = step_time(geometry, parameters, sample, gpu, zero=read_zero_json("zero2_offload")[0], **common)
    assert offloaded.offload == pytest.approx(2.5e7 * (10 / (0.8 * 64e9) + 28 / 60e9))
    waits = step_time(geometry, parameters, sample, gpu, zero=read_zero_json("zero2")[0], **common | {"num_ops": 10**6})
    assert waits.compute == pytest.approx(2 * 6.0)


def test_an_unknown_gpu_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigError, match=r"gtx.*rtx5090.*h200"):
        find_gpu("gtx")


@pytest.mark.slow
def test_the_largest_model_trains_on_one_card_of_32_gb():
    asked = request(model="1b7", limit=30.0)
    choice = planner.propose(asked)
    assert choice is not None
    assert choice.zero == "zero2_offload"
    assert choice.capacities.tokens >= 8192
    assert choice.capacities.frames >= 64
    assert choice.total <= 30 * GIB


def plan(monkeypatch, *arguments: str) -> int:
    from launch import plan as command

    monkeypatch.setattr("sys.argv", ["launch/plan.py", *arguments])
    return command.main()


def test_the_command_writes_what_it_prints(tiny_as_a_model, monkeypatch, tmp_path, capsys):
    measured = tmp_path / "throughput.json"
    measured.write_text('{"figures": {"mfu": 0.2}}')
    file = tmp_path / "plan.json"
    arguments = ["--model", "135m", "--gpu", "h200", "--gpus", "2", "--measured", str(measured), "--json", str(file)]
    assert plan(monkeypatch, *arguments) == 0
    (found,) = json.loads(file.read_text())
    printed = capsys.readouterr().out
    assert "everything below is predicted" in printed
    assert f"data.tokens={found['capacities']['tokens']} data.frames={found['capacities']['frames']}" in printed
    assert (found["gpus"], found["utilisation"]) == (2, {"value": 0.2, "origin": "measured"})


def test_the_table_has_every_machine(tiny_as_a_model, monkeypatch, capsys):
    assert plan(monkeypatch, "--table", "--model", "360m") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| 360m |") for line in lines) == len(GPUS) * 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--model"),
        (["--model", "1b7", "--gpus", "0"], "--gpus 0"),
        (["--model", "1b7", "--mfu", "1.5"], "1.5"),
        (["--model", "1b7", "--measured", "nowhere.json"], "nowhere.json"),
        (["--model", "1b7", "--gpu", "gtx"], "gtx"),
    ],
)
def test_wrong_usage_is_2_and_names_the_option(arguments, named, monkeypatch, capsys):
    assert plan(monkeypatch, *arguments) == 2
    assert named in capsys.readouterr().err


def test_nothing_fits_is_1(tiny_as_a_model, monkeypatch, capsys):
    assert plan(monkeypatch, "--model", "135m", "--memory", "0.0001") == 1
    assert "in no configuration" in capsys.readouterr().out
