"""The throughput benchmark: its samples, arithmetic and rules, and a tiny run of the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks import throughput_report
from benchmarks.dataloader_samples import MIXES, STAGE_1, STAGE_2, Source, draw_metas
from benchmarks.environment import ROOT, processor_slug
from benchmarks.mixes import make_workload
from benchmarks.naive import NaiveVLM
from benchmarks.throughput import parse, result_file
from benchmarks.throughput_contenders import BatchReader, Setting, planned_steps
from benchmarks.throughput_ladder import Rung, climb, rungs
from benchmarks.throughput_measure import Counts, Measured, Race, Schedule, largest_difference
from benchmarks.throughput_report import CHECK_TOLERANCE, Peak, check, committed, ladder_rows, plot, rates
from fvlm.data.chat import Layout, load_tokenizer, text_counts
from fvlm.model.flops import pack_flops
from fvlm.schema import ConfigError
from fvlm.train.engine import world_from_environment
from fvlm.train.work import step_flops
from fvlm.train_config import CheckpointingConfig

CPU = torch.device("cpu")


# -- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mix", "frames", "tokens"), [("stage1", 7, 220), ("stage2", 4.6, 215), ("dpo", 1, 330)])
def test_drawn_samples_are_a_stages_mean_sample(mix, frames, tokens):
    """As `fvlm.train.work_model.SAMPLES` has them: 180 to 250 tokens in stage 2."""
    sources = MIXES[mix].values()
    assert sum(source.share for source in sources) == pytest.approx(1)
    assert sum(s.share * (s.least + s.most) / 2 for s in sources) == pytest.approx(frames, rel=0.04)
    tokenizer, metas = load_tokenizer("tiny"), list(draw_metas(np.random.default_rng(1), 400, mix))
    counts = [text_counts(meta, tokenizer) for meta in metas]
    looks = [8 if meta["kind"] == "image" else meta["frame_count"] for meta in metas]
    sequences = 2 if mix == "dpo" else 1
    mean = np.mean([c.tokens + c.rejected_tokens + sequences * n for c, n in zip(counts, looks, strict=True)])
    assert mean == pytest.approx(tokens, rel=0.09)
    text = sum(meta["kind"] == "text" for meta in metas)
    assert text == (0 if mix == "dpo" else round(0.14 * 400))


@pytest.mark.parametrize(("mix", "name"), [(STAGE_1, "stage1"), (STAGE_2, "stage2")])
def test_sources_have_their_published_shares(mix: dict[str, Source], name):
    stated = yaml.safe_load((ROOT / f"launch/configs/mixtures/{name}.yaml").read_text())
    visual = {source: weight for source, weight in stated["weights"].items() if source != "smoltalk"}
    shares = dict.fromkeys(visual, 0.0)
    for source, drawn in mix.items():
        if drawn.kind != "text":
            shares[source.removesuffix("_multi")] += drawn.share
    for source, weight in visual.items():
        assert shares[source] == pytest.approx(0.86 * weight / sum(visual.values()), abs=0.002), source
    assert mix["smoltalk"].share == stated["text_share"]


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    """A tiny one; pairs."""
    overrides = ["data.tokens=512", "train.packs_per_step=2", "data.num_workers=0"]
    return make_workload(tmp_path_factory.mktemp("dpo"), "tiny", "dpo", num_samples=24, overrides=overrides)


def test_the_baselines_reader_finds_pairs_that_share_their_frames(workload):
    reader = BatchReader(workload, lambda samples, objective: (samples, objective))
    rows = np.array([3, 5])
    samples, objective = reader[rows, np.full(2, Layout.VIDEO_FIRST, np.uint8)]
    assert objective == "dpo"
    assert [sample.key for sample in samples] == [
        k for row in rows for k in [str(workload.data.indexes[0].keys[row])] * 2
    ]
    assert samples[0].frames is samples[1].frames
    assert samples[0].frames.shape == (1, 3, 56, 56)
    assert samples[0].frames.any()


def test_small_packs_have_no_room_for_the_longest_clip(tmp_path):
    """Which would leave most of their frames empty, and their time lost."""
    overrides = ["data.tokens=512", "train.packs_per_step=1"]
    found = make_workload(tmp_path, "tiny", "stage2", num_samples=160, overrides=overrides)
    frames = found.data.plan.capacities.frames
    assert frames < found.data.table.num_frames.max()
    packs = [step.packs[0] for step in planned_steps(found, 8)]
    assert np.mean([pack.frames for pack in packs]) / frames > 0.8
    assert np.mean([pack.tokens for pack in packs]) / 512 > 0.8


# -- arithmetic -----------------------------------------------------------------------------------------------------


def test_work_is_the_plans_and_recomputation_comes_on_top(workload):
    plan, train, [step] = workload.data.plan, workload.config.train, planned_steps(workload, 1)
    counts = Counts.of(workload.geometry, plan, step, train)
    assert counts.necessary == step_flops(workload.geometry, plan, step, "coarse_fine", 1) == counts.executed
    assert counts.samples == sum(len(pack.rows) for pack in step.packs) == counts.frames
    shares = CheckpointingConfig(encoder=0.5, llm=1.0)
    again = Counts.of(workload.geometry, plan, step, replace(train, activation_checkpointing=shares))
    parts = [
        pack_flops(
            workload.geometry,
            num_frames=pack.frames,
            lengths=[n for row in pack.rows for n in [pair_tokens(workload, row) / 2] * 2],
            coarse_lengths=[8] * 2 * len(pack.rows),
            num_visual=pack.visual,
            num_labels=pack.labels,
            recompute=(0.5, 1.0),
        )
        for pack in step.packs
    ]
    expected = sum(part.recomputed for part in parts)
    assert again.executed - again.necessary == pytest.approx(expected)
    assert expected > 0.5 * sum(part.coarse_llm + part.fine_llm for part in parts)
    assert again.necessary == counts.necessary


def pair_tokens(workload, row):
    """Text and visual tokens of both answers."""
    table = workload.data.table
    return table.tokens[row] + table.rejected_tokens[row] + 16


def test_rates_by_hand():
    measured = Measured(seconds=[2.0, 4.0, 2.0], waits=[0.5, 0.0, 0.5], losses=[1.0], peak_bytes=3 << 30)
    counts = [Counts(8, 40, 1600, 6e12, 8e12)] * 3
    figures = rates("it", measured, counts, Peak(12e12, "by hand"), recomputes=True)
    assert figures["it/samples_per_s"] == 4
    assert figures["it/samples_per_s_p20"] == pytest.approx(2.8)  # of 2, 4, 4
    assert figures["it/frames_per_s"] == 20
    assert figures["it/tokens_per_s"] == 800
    assert figures["it/mfu"] == pytest.approx(6e12 / 2 / 12e12)
    assert figures["it/hfu"] == pytest.approx(8e12 / 2 / 12e12)
    assert figures["it/data_wait_share"] == pytest.approx(1 / 8)
    assert figures["it/peak_gib"] == 3
    assert "it/hfu" not in rates("it", measured, counts, Peak(12e12, "by hand"), recomputes=False)


# -- races ----------------------------------------------------------------------------------------------------------


class Runner:
    """A contender whose clock is the test's."""

    def __init__(self, name, seconds, clock, losses=(3.0, 2.0, 1.0), drain=0):
        self.name, self.seconds, self.clock, self.drain = name, seconds, clock, drain
        self._losses, self.steps, self.closed = losses, 0, False

    def step(self):
        self.steps += 1
        self.clock.now += self.seconds
        self.clock.order.append(self.name)
        return self.seconds / 4

    def finish(self):
        pass

    @property
    def losses(self):
        return [self._losses[min(step, len(self._losses) - 1)] for step in range(self.steps)]

    def close(self):
        self.closed = True


class Clock:
    """Stands in for the time of day."""

    now, order = 0.0, None

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """The time that races read."""
    found = Clock()
    found.order = []
    monkeypatch.setattr("benchmarks.throughput_measure.time", found)
    for module in ("throughput_measure", "throughput_ladder"):  # nothing is held here, and the collector takes long
        monkeypatch.setattr(f"benchmarks.{module}.free_memory", lambda: None)
    return found


def test_turns_alternate_and_only_their_ends_are_timed(clock):
    race = Race(CPU, Schedule(warm_up=1, turns=2, length=2), tolerance=1e-4)
    race.enter("slow", lambda: Runner("slow", 6.0, clock))
    race.enter("fast", lambda: Runner("fast", 2.0, clock, drain=1))
    found = race.run()
    assert clock.order == ["slow", "fast", *["slow"] * 3, *["fast"] * 3, *["fast"] * 3, *["slow"] * 3]
    assert (found["slow"].seconds, found["fast"].seconds) == ([12, 12], [4, 4])
    assert found["slow"].waits == [3, 3]
    assert race.timed() == [range(2, 4), range(5, 7)]
    assert largest_difference(found) == 0
    runners = list(race.contenders.values())
    race.leave()
    assert all(runner.closed for runner in runners)


@pytest.mark.parametrize("wrong", [2.1, float("nan")])
def test_losses_that_differ_end_a_race(clock, wrong):
    race = Race(CPU, Schedule(warm_up=1, turns=1, length=1), tolerance=1e-2)
    race.enter("one", lambda: Runner("one", 1.0, clock))
    race.enter("other", lambda: Runner("other", 1.0, clock, losses=(3.0, wrong)))
    with pytest.raises(RuntimeError, match=r"step 1: the loss of other is (2.1|nan), that of one 2.0; 0.01"):
        race.run()


def _with_zero1(before):
    return replace(before, zero="zero1")


def test_a_ladder_goes_on_in_small_races_and_says_what_did_not_run(clock, tmp_path):
    seconds = {"naive": 8.0, "better": 4.0, "best": 2.0, "other": 4.0}
    plain = Setting()
    ladder = [
        Rung("naive", NaiveVLM), Rung("early", _with_zero1), Rung("better", plain),
        Rung("missing", _with_zero1, refused="there is no GPU"), Rung("broken", _with_zero1),
        Rung("best", _with_zero1), Rung("other", lambda before: replace(before, kernels="torch"), is_side=True),
    ]  # fmt: skip

    def build(rung):
        if rung.name == "broken":
            raise ConfigError("train.optimizer = it: cannot be built here")
        return Runner(rung.name, seconds[rung.name], clock)

    plan = Schedule(warm_up=1, turns=2, length=1)
    climbed, not_run = climb(ladder, build, lambda: Race(CPU, plan, 1e-4), together=2)
    assert [(each.name, each.against, each.to_first) for each in climbed] == [
        ("naive", None, 1), ("better", "naive", 2), ("best", "better", 4), ("other", "best", 2),
    ]  # fmt: skip
    assert climbed[3].factor.median == 0.5
    assert [each.rung.what for each in climbed] == [
        NaiveVLM, plain, Setting(zero="zero1"), Setting(zero="zero1", kernels="torch"),
    ]  # fmt: skip
    refused = "ConfigError: train.optimizer = it: cannot be built here"
    early = "ConfigError: rung early changes a setting of the product: expected `product` before it"
    assert not_run == {"early": early, "missing": "there is no GPU", "broken": refused}
    counts, figures = [Counts(8, 40, 1600, 6e12, 8e12)] * 2, {}
    for each in climbed:
        figures |= rates(each.name, each.measured, counts, Peak(12e12, "by hand"), recomputes=False)
    rows = ladder_rows(climbed, not_run, figures)
    assert rows[2]["factor"] == "2.00 (2.00-2.00) over better"
    assert rows[6] == dict.fromkeys(rows[0]) | {"": "broken", "factor": f"not run: {refused}"}
    assert plot(climbed, figures, "by hand", tmp_path / "ladder").read_bytes().startswith(b"\x89PNG")


def test_rungs_that_need_a_gpu_are_refused_without_one():
    refused = {rung.name for rung in rungs(False, Setting()) if rung.refused and "GPU" in rung.refused}
    assert refused >= {"kernels", "cuda_graphs", "deepspeed_fused"}
    names = [rung.name for rung in rungs(True, Setting(zero="zero1"))]
    assert names[:6] == ["naive", "kv_once", "stills_once", "loss_positions", "packed", "product"]
    assert {"zero0", "zero2", "zero3"} <= set(names)
    assert "zero1" not in names


# -- the last committed result --------------------------------------------------------------------------------------


def result(speedup, **settings):
    """Contents of a result file."""
    return {"figures": {"speedup": speedup}, "settings": {"model": "tiny", "tokens": 512} | settings, "commit": "abc"}


def test_a_slower_step_fails_the_check_and_other_settings_are_not_compared():
    just, less = 2 * (1 - CHECK_TOLERANCE) + 1e-6, 2 * (1 - CHECK_TOLERANCE) - 1e-6
    assert check(result(just), result(2))[0]
    fine, sentence = check(result(less), result(2))
    assert not fine
    assert "at commit abc it was 2.00; expected at least 1.80" in sentence
    fine, sentence = check(result(1), result(2, tokens=1024))
    assert fine
    assert "other settings (tokens 1024 -> 512)" in sentence
    fine, sentence = check(result(1), None)
    assert fine
    assert "no committed result" in sentence


def test_the_committed_result_is_git_s_not_the_folder_s(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput_report, "ROOT", tmp_path)
    file = tmp_path / "found.json"
    file.write_text(json.dumps(result(3)))
    assert committed(file) is None  # no repository yet
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    file.write_text(json.dumps(result(1)))
    assert committed(file) == result(3)
    assert committed(Path("/elsewhere/found.json")) is None


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--together", "1"], ["--batch-size", "0"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    assert "expected at least" in capsys.readouterr().err


def test_results_are_named_by_what_was_measured():
    if torch.cuda.is_available():
        pytest.skip("named after the GPU here")
    found = result_file(parse(["--model", "360m", "--mix", "dpo", "--ladder"]), world_from_environment())
    assert found.name == f"throughput-ladder-360m-dpo-{processor_slug()}.json"


def test_a_tiny_run_of_the_script(tmp_path):
    """Baseline and product train the same, and everything that is promised is reported."""
    file = tmp_path / "found.json"
    size = ["--steps", "2", "--tokens", "256", "--samples", "40", "--scratch", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmarks/throughput.py"), "--model", "tiny", *size]
    done = subprocess.run(
        [*command, "--json", str(file), "--check"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no committed result of this machine" in done.stdout
    assert "times as fast as the baseline" in done.stdout
    contents = json.loads(file.read_text())
    figures = contents["figures"]
    for name in ("naive", "product"):
        assert figures[f"{name}/samples_per_s"] > 0
        assert 0 < figures[f"{name}/mfu"] < 2  # of a product of matrices that something else may have slowed down
        assert 0 <= figures[f"{name}/data_wait_share"] < 1
        assert figures[f"{name}/peak_gib"] > 0
        assert len(contents["losses"][name]) == 3
    assert figures["loss_difference"] < 1e-4
    assert figures["product/padding_in_attention"] == 0
    assert figures["product/recompilations"] == 0
    ratios = [a / b for a, b in zip(contents["seconds"]["naive"], contents["seconds"]["product"], strict=True)]
    assert figures["speedup"] == pytest.approx(np.median(ratios))
    assert contents["settings"]["tokens"] == 256
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
