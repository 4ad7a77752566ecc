"""`launch/export.py` and `launch/import_published.py`, and the model card that they write."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fvlm.config import load_config
from fvlm.hub.opening import open_model
from fvlm.model import FoveatedVLM, build_model, tiny_config
from fvlm.train.build import load_model
from launch.describe import main as describe
from launch.export import main as export
from launch.import_published import main as import_published


@pytest.fixture
def records(run):
    """The run with the records of its end and of its evaluation."""
    summary = {
        "steps": 100,
        "samples_seen": 3200,
        "commit": "0123abc",
        "best": {"score": -1.25, "step": 100, "metrics": {"val_loss": 1.25}},
        "cost": {"gpu_hours": 1.5, "price_per_gpu_hour": 2.0, "money": 3.0},
        "dtype": "bf16",
        "world_size": 2,
        "zero_stage": 2,
        "sources": {"drawn/cue": {"licence": "CC0-1.0", "citation": "Drawn | by us"}},
        "environment": {"device": "two cores", "torch": "2.13.0"},
    }
    (run / "run_summary.json").write_text(json.dumps(summary))
    with (run / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "samples_seen", "train_loss", "val_loss", "loss_ratio"])
        rows.writerows([[50, 1600, 2.0, 1.75, 0.9], [100, 3200, 1.0, 1.25, 0.8]])
    figures = {"accuracy": 0.415, "n": 200, "chance": 0.25, "low": 0.349, "high": 0.484, "flags": []}
    modes = {
        mode: {"loss": {"loss": loss}, "mvbench": {"overall": figures}}
        for mode, loss in (("coarse_only", 1.5), ("coarse_fine", 1.25), ("autoregressive", 1.375))
    }
    modes["coarse_fine"]["drawn/val captions"] = {"cider": 1.5, "bleu_4": 0.25, "meteor": 0.125, "n": 40}
    write_evaluation(run, modes)
    return run


def write_evaluation(run, modes, step="step-00000100"):
    (run / "evaluation").mkdir(exist_ok=True)
    checkpoint = f"runs/drawn/checkpoints/{step}/weights/model.safetensors"
    (run / "evaluation" / "evaluation.json").write_text(json.dumps({"checkpoint": checkpoint, "modes": modes}))


def row(card: str, *begins: str) -> list[str]:
    """Cells of the one table row that begins with these."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in card.splitlines() if line[:1] == "|"]
    (found,) = [cells for cells in rows if tuple(cells[: len(begins)]) == begins]
    return found


def test_a_run_is_exported_with_what_it_knows(records, tmp_path, capsys):
    out = tmp_path / "published"
    assert export(["--checkpoint", str(records), "--out", str(out), "--licence", "apache-2.0"]) == 0
    assert "step-00000100" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    front, title, _ = card.split("\n", 1)[1].partition("# published")
    assert title
    assert "license: apache-2.0\n" in front
    assert row(card, "drawn/cue") == ["drawn/cue", "natural", "CC0-1.0", "Drawn \\| by us"]
    assert row(card, "device-hours")[1] == "1.5"
    assert row(card, "money")[1] == "3.00 at 2 a device-hour"
    assert row(card, "exported from")[1] == "`drawn, step-00000100`"
    assert row(card, "best checkpoint")[1] == "step 100, score -1.25"
    assert row(card, "drawn/val captions", "coarse→fine")[2:] == ["1.5", "0.25", "0.125", "40"]
    assert str(tmp_path) not in card
    assert row(card, "last")[1:] == ["100", "3200", "1", "1.25", "0.8"]
    assert row(card, "MVBench", "coarse→fine") == ["MVBench", "coarse→fine", "41.5 % [34.9–48.4]", "28.0 %"]
    assert row(card, "Video-MME", "autoregressive") == ["Video-MME", "autoregressive", "–", "28.7 %"]
    assert row(card, "ScienceQA")[3] == "36.0 %"
    assert "`fine_iterations` [2, 1]" in card
    assert "not of the exported" not in card
    missing = card.split("## Not on record")[1]
    assert "metrics.jsonl" in missing
    assert "metrics.csv" not in missing
    processor = json.loads((out / "processor_config.json").read_text())
    assert (processor["looks"], processor["frame_size"]) == (5, 56)
    assert not list(tmp_path.glob(".published*"))


def test_figures_of_another_checkpoint_are_said_to_be(records, tmp_path):
    write_evaluation(records, {"coarse_fine": {"loss": {"loss": 1.0}}}, "step-00000050")
    assert export(["--checkpoint", str(records), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "> The figures below are of `step-00000050`, not of the exported `step-00000100`." in card
    assert "license:" not in card


def test_a_checkpoint_without_records_has_a_card_without_figures(run, model, clip, tmp_path, capsys):
    checkpoint, out = run / "checkpoints" / "step-00000100", tmp_path / "bare"
    (run / "config.yaml").unlink()
    assert export(["--checkpoint", str(checkpoint), "--out", str(out), "--dtype", "bf16"]) == 0
    assert "no run beside these weights" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "without the records of a run" in card
    assert "Not on record." in card
    weights = load_file(out / "model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["q_init"], model.q_init.detach().bfloat16())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_run_and_its_export_answer_alike(run, clip, tmp_path, capsys):
    assert export(["--checkpoint", str(run), "--out", str(tmp_path / "out")]) == 0
    answers = []
    for name in (run, tmp_path / "out"):
        capsys.readouterr()
        arguments = [str(clip), "--model", str(name), "--ask", "What?", "--new-tokens", "5", "--device", "cpu"]
        assert describe([*arguments, "--mode", "coarse_fine", "--fine-iterations", "2"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert open_model(str(run)).fine_iterations == 2


def test_an_export_looks_as_its_run_trained(run, clip, tmp_path, monkeypatch):
    for place in (run, run / "checkpoints" / "step-00000100"):
        config = yaml.safe_load((place / "config.yaml").read_text())
        config["train"]["mode"] = "coarse_only"
        (place / "config.yaml").write_text(yaml.safe_dump(config))
    assert export(["--checkpoint", str(run), "--out", str(tmp_path / "out")]) == 0
    opened, looked, look = open_model(str(tmp_path / "out")), [], FoveatedVLM.visual_tokens
    assert (opened.default_mode, opened.fine_iterations) == ("coarse_only", 2)
    monkeypatch.setattr(FoveatedVLM, "visual_tokens", lambda *given: looked.append(given[3:5]) or look(*given))
    opened.model.generate(**opened.processor(videos=clip, text="What?"), max_new_tokens=1)
    assert looked == [("coarse_only", 2)]


def test_answers_end_with_the_turn_though_the_back_bone_ends_otherwise(tokenizer, tmp_path):
    config = tiny_config(len(tokenizer))
    config.llm_config.eos_token_id, config.llm_config.pad_token_id = 0, None  # as of a base model
    build_model(config).save_pretrained(tmp_path / "base")
    opened = open_model(str(tmp_path / "base"), "tiny")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = opened.model.llm.generation_config
    assert (found.eos_token_id, found.pad_token_id) == (end, end)
    arguments = ["--checkpoint", str(tmp_path / "base"), "--tokenizer", "tiny", "--out", str(tmp_path / "out")]
    assert export(arguments) == 0
    exported = FoveatedVLM.from_pretrained(tmp_path / "out").llm
    assert exported.generation_config.eos_token_id == end
    assert exported.model.embed_tokens.padding_idx is None  # no row of it is left out of further training


def test_an_export_is_exported_again_and_trained_on(exported, model, run, tmp_path):
    assert export(["--checkpoint", str(exported), "--out", str(tmp_path / "again")]) == 0
    first, again = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    config = load_config(str(run / "config.yaml"), [f"init_from={exported}"])
    trained = load_model(config, model.config.llm_config.vocab_size)
    assert torch.equal(trained.q_static, model.q_static)


def test_the_control_is_exported_under_its_own_class(tokenizer, clip, tmp_path):
    build_model(tiny_config(len(tokenizer), architecture="multi_token")).save_pretrained(tmp_path / "model")
    arguments = ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--tokenizer", "tiny"]
    assert export(arguments) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_fvlm.MultiTokenModel"
    assert "4 pooled tokens" in (tmp_path / "out" / "README.md").read_text()
    assert describe([str(clip), "--model", str(tmp_path / "out"), "--new-tokens", "2", "--device", "cpu"]) == 0


def test_an_export_gives_way_where_that_is_asked_for(run, tmp_path):
    out = tmp_path / "out"
    assert export(["--checkpoint", str(run), "--out", str(out), "--name", "first"]) == 0
    (out / "model.safetensors").unlink()
    assert export(["--checkpoint", str(run), "--out", str(out), "--name", "second", "--replace"]) == 0
    assert (out / "model.safetensors").is_file()
    assert "second" in (out / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "runs"}


def test_nothing_is_overwritten_and_nothing_half_is_left(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    assert export(["--checkpoint", str(run), "--out", str(out)]) == 2
    assert f"export: --out {out}: exists already" in capsys.readouterr().err
    (out / "notes.txt").touch()
    assert export(["--checkpoint", str(run), "--out", str(out), "--replace"]) == 2
    assert "no export writes notes.txt" in capsys.readouterr().err
    (out / "notes.txt").unlink()
    out.rmdir()
    monkeypatch.setattr("fvlm.hub.export.flatten", lambda: {"missing/folder.py": "text"})
    assert export(["--checkpoint", str(run), "--out", str(out)]) == 1
    assert "missing/folder.py" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_what_is_no_model_is_said(run, model, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert export(["--checkpoint", str(tmp_path / "nowhere"), *out]) == 2
    assert "nowhere" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "model")
    assert export(["--checkpoint", str(tmp_path / "model"), *out]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    (run / "run_summary.json").write_text("{")
    assert export(["--checkpoint", str(run), *out]) == 1
    assert "run_summary.json: not valid JSON" in capsys.readouterr().err


class TestImport:
    """The geometry that a published file does not carry."""

    @pytest.fixture
    def published(self, model, tmp_path):
        torch.save({"model_state_dict": model.state_dict(), "global_step": 3}, tmp_path / "best.pt")
        return tmp_path / "best.pt"

    @pytest.fixture
    def geometry(self, model, tmp_path):
        content = {"llm": model.config.llm_config.to_dict(), "vision": model.config.vision_config.to_dict()}
        content |= {"visual_scale": 1.0, "lambda_coarse": 0.5}
        (tmp_path / "geometry.json").write_text(json.dumps(content))
        return tmp_path / "geometry.json"

    def test_by_a_file(self, published, geometry, model, tmp_path):
        out = tmp_path / "imported"
        arguments = [str(published), "--config", str(geometry), "--tokenizer", "tiny", "--out", str(out)]
        assert import_published(arguments) == 0
        opened = open_model(str(out))
        assert opened.model.config.visual_scale == 1.0
        assert all(torch.equal(x, opened.model.state_dict()[name]) for name, x in model.state_dict().items())
        assert "`best.pt`" in (out / "README.md").read_text()

    def test_by_the_back_bones(self, published, model, tokenizer, tmp_path):
        model.config.llm_config.save_pretrained(tmp_path / "llm")
        tokenizer.save_pretrained(tmp_path / "llm")
        model.config.vision_config.save_pretrained(tmp_path / "dino")
        arguments = [str(published), "--llm", str(tmp_path / "llm"), "--vision", str(tmp_path / "dino")]
        assert import_published([*arguments, "--out", str(tmp_path / "imported")]) == 0
        assert open_model(str(tmp_path / "imported")).model.config.visual_scale == 0.14
        swapped = [str(published), "--llm", str(tmp_path / "dino"), "--vision", str(tmp_path / "llm")]
        assert import_published([*swapped, "--out", str(tmp_path / "no")]) == 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"llm": None}, "llm: expected the back bone's configuration"),
            ({"colour": 1}, "unknown colour"),
            ({"grid": 3}, "grid: expected 1, 4 or 16, got 3"),
        ],
    )
    def test_a_geometry_that_cannot_be(self, published, geometry, tmp_path, capsys, change, message):
        geometry.write_text(json.dumps(json.loads(geometry.read_text()) | change))
        arguments = [str(published), "--config", str(geometry), "--tokenizer", "tiny", "--out", str(tmp_path / "out")]
        assert import_published(arguments) == 2
        assert message in capsys.readouterr().err

    def test_a_file_that_does_not_fit_or_is_not_there(self, published, geometry, tmp_path, capsys):
        options = ["--config", str(geometry), "--tokenizer", "tiny", "--out", str(tmp_path / "out")]
        assert import_published([str(tmp_path / "no.pt"), *options]) == 2
        assert "no.pt: no such file" in capsys.readouterr().err
        torch.save({"model_state_dict": {"q_init": torch.zeros(1, 5)}}, published)
        assert import_published([str(published), *options]) == 1
        assert "does not fit the geometry" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_wrong_usage(self, published, geometry, tmp_path):
        for wrong in (
            ["--llm", "x"],
            ["--config", str(geometry)],
            ["--config", str(geometry), "--tokenizer", "tiny", "--looks", "0"],
            ["--config", str(geometry), "--llm", "a", "--vision", "b"],
        ):
            with pytest.raises(SystemExit) as stopped:
                import_published([str(published), "--out", str(tmp_path / "out"), *wrong])
            assert stopped.value.code == 2
