"""From shards and a checkpoint to figures by mode: in training, after it, and from the command line."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fvlm.data.chat import Text
from fvlm.data.errors import SampleError
from fvlm.data.plan import Mixture
from fvlm.data.shard import ShardWriter, find_shards
from fvlm.data.video import encode_jpeg
from fvlm.evaluate import suite as suite_module
from fvlm.evaluate.asking import Questions, evaluate_modes, gaps, ordering_table
from fvlm.evaluate.items import in_turn
from fvlm.evaluate.maps import load_clip
from fvlm.evaluate.suite import ORDERINGS, TASKS, build_suite, training_figures
from fvlm.model import build_model, tiny_config
from fvlm.model.base import cast_parameters
from fvlm.model.configuration import MODES
from fvlm.schema import ConfigError
from tests.evaluate.reference import SHAPES


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """Shards with lists, options, a caption, a still and text."""
    path = tmp_path_factory.mktemp("val")
    rng = np.random.default_rng(0)
    with ShardWriter(path, tokenizer, samples_per_shard=5) as writer:
        for number in range(12):
            count = (3, 3, 2, 1, 0, 3)[number % 6]
            kind = ("video", "video", "video", "image", "text", "video")[number % 6]
            words = rng.choice(SHAPES, 2).tolist()
            answer, extra = (
                (" ".join(words), {"narration": ["", *(f" {w}" for w in words)], "look_at": [[0, 0], [1, 2], [3, 3]]}),
                (words[0], {"options": list(SHAPES), "answer": SHAPES.index(words[0])}),
                ("A red ring above a blue bar.", {}),
                (words[1], {"options": list(SHAPES[:4]), "answer": 0} if words[1] == SHAPES[0] else {}),
                ("yes", {}),
                (words[0], {}),
            )[number % 6]
            meta = {"key": f"k{number}", "source": f"s{number % 6}", "kind": kind, "frame_count": count}
            meta |= {"duration": float(count), "user": "What is it?", "assistant": answer, **extra}
            frames = rng.integers(0, 256, (count, 56, 56, 3), dtype=np.uint8)
            writer.write(meta, [encode_jpeg(frame) for frame in frames])
    return path


@pytest.fixture(scope="module")
def small(tokenizer):
    torch.manual_seed(0)
    return build_model(tiny_config(len(tokenizer))).eval()


def build(folder, tokenizer, mixture=Mixture(looks=2), **options):  # noqa: B008
    options = {"image_size": 56, "device": "cpu", "tokens": 256, **options}
    return build_suite(find_shards(folder), tokenizer, mixture, **options)


def test_three_modes(folder, tokenizer, small):
    suite = build(folder, tokenizer, tasks=[task for task in TASKS if task != "captions"])
    found = evaluate_modes(Questions(suite=suite), small)
    assert json.loads(json.dumps(found)) == found
    assert list(found["modes"]) == list(MODES)
    for figures in found["modes"].values():
        assert figures["loss"]["samples"] == figures["blank"]["samples"] == 12
        assert figures["loss"]["composition"]["s0"]["share"] == pytest.approx(1 / 6)
        assert figures["blank"]["loss_by_source"]["s4"] == pytest.approx(figures["loss"]["loss_by_source"]["s4"])
        assert figures["blank"]["loss"] != figures["loss"]["loss"]
        assert figures["slots"]["overall"]["n"] == 2
        assert figures["seconds_per_sample"] > 0
        assert figures["loss"]["interval"][0] < figures["loss"]["loss"] < figures["loss"]["interval"][1]
        assert set(figures["loss"]["interval_by_source"]) == set(figures["loss"]["loss_by_source"])
    fine, stream = (found["modes"][mode] for mode in ("coarse_fine", "autoregressive"))
    assert found["gaps"]["loss"] == stream["loss"]["loss"] - fine["loss"]["loss"]
    assert set(found["gaps"]) == {"loss", "slots", "multiple_choice"}
    assert all(set(sample["choices"]) == set(MODES) for sample in found["samples"])


def test_figures_during_training_have_the_names_of_the_records(folder, tokenizer, small):
    suite = build(folder, tokenizer, tasks=("loss", "slots"))
    figures = training_figures(suite, small, "coarse_fine", 2)
    assert {"val_loss", "loss_fine", "loss_coarse", "loss_ratio", "attention_entropy"} <= set(figures)
    assert {f"slots/coarse_fine/{name}" for name in ("accuracy", "n", "chance", "low", "high")} <= set(figures)
    assert all(isinstance(value, (int, float)) for value in figures.values())
    assert suite.clips == []


def test_limits_and_packs_do_not_change_the_numbers(folder, tokenizer, small):
    wide, narrow = (build(folder, tokenizer, tokens=tokens).losses(small, "coarse_fine") for tokens in (1024, 128))
    assert narrow.loss == pytest.approx(wide.loss, rel=1e-5)
    assert narrow.loss_by_source == pytest.approx(wide.loss_by_source, rel=1e-5)
    assert build(folder, tokenizer, most_samples=5).losses(small, "coarse_only").samples == 5


def test_samples_without_room_are_counted(folder, tokenizer, small):
    lengths = [30, 60]
    few, all_ = (build(folder, tokenizer, tokens=tokens, tasks=("loss",)) for tokens in lengths)
    assert all_.losses(small, "coarse_only").skipped == {}
    report = few.losses(small, "coarse_only")
    assert report.samples + sum(report.skipped.values()) == 12
    assert sum(report.skipped.values()) > 0


def test_baseline_sees_stills_once_and_has_no_maps(folder, tokenizer):
    torch.manual_seed(0)
    baseline = build_model(tiny_config(len(tokenizer), architecture="multi_token", grid=4)).eval()
    suite = build(folder, tokenizer, Mixture(grid=4), tasks=("loss", "mc", "slots", "maps"))
    assert suite.maps(baseline, ["coarse_fine"]) == []
    found = evaluate_modes(Questions(suite=suite), baseline, ["coarse_fine"])
    assert found["gaps"] == {}
    assert found["modes"]["coarse_fine"]["loss"]["loss_ratio"] is None


def test_an_unreadable_clip_gives_its_place_to_the_next(folder, tokenizer, small, caplog):
    def broken():
        raise SampleError("bad_jpeg", "not a picture")

    suite = build(folder, tokenizer, tasks=("loss", "maps"), num_clips=2)
    whole = [clip.key for clip in suite.maps(small, ["coarse_only"])]
    assert whole == [item.meta["key"] for item in suite.clips[:2]]
    assert suite.clips_skipped == {}
    first, second, third = suite.clips[:3]
    hurt = [replace(first, read_frames=broken), second, replace(third, meta=third.meta | {"assistant": ""})]
    suite = replace(suite, clips=[*hurt, *suite.clips[3:]])
    for _ in range(2):  # counted anew each time
        shown = suite.maps(small, ["coarse_only"])
        assert [clip.key for clip in shown] == [suite.clips[i].meta["key"] for i in (1, 3)]
        assert suite.clips_skipped == {"bad_jpeg": 1, "empty_text": 1}
    assert training_figures(suite, small, "coarse_only")["maps/skipped"] == 2
    assert f"clip {first.meta['key']} left out: bad_jpeg: not a picture" in caplog.text
    assert replace(suite, clips=hurt[:1]).maps(small, ["coarse_only"]) == []


def test_bf16_weights_leave_buffers_alone(folder, tokenizer, small):
    model = cast_parameters(copy.deepcopy(small), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    before = dict(small.named_buffers())
    assert any(buffer.is_floating_point() for buffer in before.values())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
        assert buffer.dtype == before[name].dtype, name
    suite = build(folder, tokenizer, tasks=("loss",))
    expected = suite.losses(small, "coarse_fine").loss
    assert suite.losses(model, "coarse_fine").loss == pytest.approx(expected, rel=0.02)


def test_what_cannot_be_asked_is_said_before_anything_runs(folder, tokenizer, tmp_path):
    with pytest.raises(
        ConfigError, match="tasks: songs unknown; expected some of loss, blank, mc, slots, captions, maps"
    ):
        build(folder, tokenizer, tasks=("songs",))
    with ShardWriter(tmp_path, tokenizer) as writer:
        writer.write({"key": "t", "source": "s", "kind": "text", "frame_count": 0, "user": "u", "assistant": "a"}, [])
    with pytest.raises(ConfigError, match="tasks: slots was asked, and no sample of the set is answered by a list"):
        build(tmp_path, tokenizer, tasks=("slots",))
    assert "slots" not in build(tmp_path, tokenizer, tasks=None).tasks
    with pytest.raises(ConfigError, match=r"validation set of 12 samples: .*no sample fits"):
        build(folder, tokenizer, tokens=8)


def test_captions_need_what_scores_them_only_where_asked_by_name(folder, tokenizer, tmp_path, monkeypatch, caplog):
    def missing():
        raise ConfigError("tasks: captions needs `java` on PATH")

    assert {item.meta["key"] for item in build(folder, tokenizer, tasks=("captions",)).captions.items} >= {"k2", "k5"}
    monkeypatch.setattr(suite_module, "require_caption_metrics", missing)
    with pytest.raises(ConfigError, match="captions needs `java`"):
        build(folder, tokenizer, tasks=("captions",))
    with caplog.at_level("INFO"):
        suite = build(folder, tokenizer)
    assert "captions" not in suite.tasks
    assert suite.captions is None
    assert "captions left out: tasks: captions needs `java` on PATH" in caplog.text
    with ShardWriter(tmp_path, tokenizer) as writer:
        writer.write({"key": "t", "source": "s", "kind": "text", "frame_count": 0, "user": "u", "assistant": "a"}, [])
    with pytest.raises(ConfigError, match="no sample of the set is answered by free text"):
        build(tmp_path, tokenizer, tasks=("captions",))


def test_question_first_shows_the_same_set_in_the_other_order(folder, tokenizer, small):
    first, directed = (build(folder, tokenizer, tasks=("loss", "mc"), layout=layout) for layout in ORDERINGS.values())
    asked = [
        evaluate_modes(Questions(suite=suite), small, ["coarse_only", "coarse_fine"]) for suite in (first, directed)
    ]
    losses = [found["modes"]["coarse_fine"]["loss"] for found in asked]
    assert losses[0]["composition"] == losses[1]["composition"]
    assert losses[0]["loss_by_source"]["s4"] == pytest.approx(losses[1]["loss_by_source"]["s4"]), "text alone"
    assert losses[0]["loss_by_source"]["s2"] != pytest.approx(losses[1]["loss_by_source"]["s2"], rel=1e-6)
    assert {type(part) for part in directed.choice[0].questions[0].request.texts[0][:1]} == {Text}
    table = ordering_table(dict(zip(ORDERINGS, (found["modes"] for found in asked), strict=True)))
    assert [(name, ordering) for name, ordering, _ in table] == [
        (name, ordering) for name in ("loss", "multiple_choice") for ordering in ORDERINGS
    ]


def test_preference_models_are_asked_about_answers_where_there_are_no_pairs(folder, tokenizer, small):
    losses = [
        build(folder, tokenizer, objective=objective, tasks=("loss",)).losses(small, "coarse_fine").loss
        for objective in ("dpo", "ce_answer")
    ]
    assert losses[0] == losses[1]


def test_gaps_need_both_modes():
    assert gaps({"coarse_fine": {"loss": {"loss": 1.0}}}) == {}
    both = {"coarse_fine": {"loss": {"loss": 1.0}}, "autoregressive": {"loss": {"loss": 1.5}}}
    assert gaps(both) == {"loss": 0.5}


def test_sources_take_turns():
    assert in_turn(["a1", "a2", "a3", "b1", "c1", "c2"], lambda name: name[0]) == ["a1", "b1", "c1", "a2", "c2", "a3"]


@pytest.mark.slow
def test_command_line(folder, tokenizer, small, repo_root, tmp_path):
    small.save_pretrained(tmp_path / "model")
    command = [sys.executable, str(repo_root / "launch" / "evaluate.py"), "--checkpoint", str(tmp_path / "model")]
    options = ["--data", str(folder), "--out", str(tmp_path / "out"), "--modes", "coarse_fine", "--tokens", "256"]

    def launch(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)

    refused = launch(*options)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("evaluate: --tokenizer: the checkpoint does not say which")
    zero = launch(*options, "--tokenizer", "tiny", "--fine-iterations", "0")
    assert (zero.returncode, zero.stdout) == (2, "")
    assert "--fine-iterations: '0': expected a whole number of at least 1" in zero.stderr
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for shard in find_shards(folder):
        (foreign / shard.name).write_bytes(shard.read_bytes())
    options[1] = str(foreign)
    no_place = launch(*options, "--tokenizer", "tiny", "--tasks", "loss")
    assert no_place.returncode == 1
    assert "no usable index" in no_place.stderr
    assert "data.cache_dir" in no_place.stderr
    options += ["--cache-dir", str(tmp_path / "cache"), "--dtype", "bf16"]
    rounded = launch(*options, "--tokenizer", "tiny", "--tasks", "loss")
    assert rounded.returncode == 0, rounded.stderr
    assert len(list((tmp_path / "cache").glob("*.idx"))) == len(find_shards(folder))
    options[-1] = "fp32"
    without_maps = launch(*options, "--tokenizer", "tiny", "--tasks", "loss")
    assert without_maps.returncode == 0, without_maps.stderr
    done = launch(*options, "--tokenizer", "tiny", "--tasks", "loss", "slots", "maps")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    suite = build(folder, tokenizer, Mixture(), objective="ce_answer", tasks=("loss",))
    expected = suite.losses(small, "coarse_fine").loss
    assert record["modes"]["coarse_fine"]["loss"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert f"{expected:.4f}" in done.stdout
    assert {"commit", "environment", "checkpoint", "parameters"} <= set(record)
    assert record["maps_skipped"] == {}
    assert record["complete"]
    Image.new("RGB", (64, 64)).save(tmp_path / "pope.jpg")
    (tmp_path / "published" / "pope").mkdir(parents=True)
    row = {"question_id": 1, "image": str(tmp_path / "pope.jpg"), "text": "Is there a cup?", "label": "no"}
    lines = [row, row | {"question_id": 2, "image": "nowhere.jpg"}]
    annotations = tmp_path / "published" / "pope" / "coco_pope_random.json"
    annotations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    further = ["--tokenizer", "tiny", "--tasks", "loss", "pope", "--benchmark-data", str(tmp_path / "published")]
    both = launch(*options, *further, "--orderings", "video_first", "question_first")
    assert both.returncode == 0, both.stderr
    assert "goes on with" in both.stderr
    assert "50.0% of all: 2 asked, 1 missing, 0 broken" in both.stdout or "0.0% of all: 2 asked" in both.stdout
    assert [line.split()[:2] for line in both.stdout.splitlines() if "question_first" in line] == [
        ["loss", "question_first"],
        ["pope", "question_first"],
    ]
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert again["modes"]["coarse_fine"]["loss"] == record["modes"]["coarse_fine"]["loss"], "timings would differ"
    assert again["other_orderings"]["question_first"]["modes"]["coarse_fine"]["pope"]["overall"]["asked"] == 2
    anew = launch(*options, "--tokenizer", "tiny", "--tasks", "loss", "--restart")
    assert anew.returncode == 0, anew.stderr
    restarted = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(restarted["modes"]["coarse_fine"]) == {"loss", "seconds_per_sample"}
    assert load_clip(tmp_path / "out" / record["maps"][0]).look_at.tolist() == [[0, 0], [1, 2], [3, 3]]
