"""What cannot work is said in one message and an exit code, before the first step wherever that is possible."""

from __future__ import annotations

import json
import sys
from subprocess import PIPE, STDOUT, Popen

import pytest
from launched import ROOT, arguments, finish, launch

from fvlm.data.chat import load_tokenizer
from fvlm.model import build_model, tiny_config

CANNOT_WORK = {
    "wrong key": (["train.sede=1"], "unknown key train.sede (did you mean seed?)"),
    "wrong type": (["train.clip=tight"], "train.clip = 'tight': expected a number"),
    "missing shards": (["data.train=[/nowhere]"], "/nowhere"),
    "missing validation shards": (["data.val=[/nowhere]"], "data.val = ['/nowhere']"),
    "init_from": (["init_from=/nowhere"], "init_from = '/nowhere': no such file"),
    "nothing fits": (["data.tokens=20"], "data.train"),
    "unknown figure": (
        ["best_metric={val_loss/colour: -1}"],
        "best_metric = 'val_loss/colour': not a figure of this run's evaluation (did you mean val_loss/colours?); "
        "expected some of attention_entropy, loss_coarse, loss_fine, loss_ratio, val_loss, val_loss/colours, "
        "val_loss/words",
    ),
    "figure of another mode": (
        ["train.mode=coarse_only", "best_metric={loss_ratio: -1}"],
        "best_metric = 'loss_ratio'",
    ),
    "figure of a task not asked": (["best_metric={slots/coarse_fine/accuracy: 1}"], "slots/coarse_fine/accuracy"),
    "unknown source": (["data.mixture.weights={webvid: 1}"], "webvid"),
}


def refused(monkeypatch, capsys, command_line: list[str]) -> tuple[int, str]:
    """(exit code, what was printed) of a start in this process that has to end before there is an engine."""
    import launch.train

    monkeypatch.setattr(sys, "argv", ["train.py", *command_line])
    monkeypatch.setattr(launch.train, "start_ranks", lambda: None)
    monkeypatch.setattr(launch.train, "Engine", None)
    code = launch.train.main()
    return code, capsys.readouterr().err


@pytest.mark.parametrize("case", CANNOT_WORK)
def test_what_cannot_work_is_said_in_one_message_before_the_first_step(shards, tmp_path, case, monkeypatch, capsys):
    overrides, message = CANNOT_WORK[case]
    code, printed = refused(monkeypatch, capsys, arguments(shards, tmp_path, *overrides))
    assert code == 2
    assert printed.startswith("train: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "metrics.csv").exists()


def test_an_empty_data_set_is_said(shards, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    overrides = [f"data.train=[{tmp_path / 'empty'}]"]
    code, printed = refused(monkeypatch, capsys, arguments(shards, tmp_path / "out", *overrides))
    assert code == 2
    assert str(tmp_path / "empty") in printed


def test_contradictory_zero_json_is_said(shards, tmp_path, monkeypatch, capsys):
    contents = json.loads((ROOT / "ds_configs/zero2.json").read_text()) | {"gradient_clipping": 5.0}
    (tmp_path / "mine.json").write_text(json.dumps(contents))
    command = arguments(shards, tmp_path / "out", zero=str(tmp_path / "mine.json"))
    code, printed = refused(monkeypatch, capsys, command)
    assert code == 2
    assert "mine.json: gradient_clipping = 5.0 contradicts 1.0 (train.clip)" in printed


def test_a_tokenizer_larger_than_the_models_vocabulary_is_said(shards, tmp_path, monkeypatch, capsys):
    build_model(tiny_config(100)).save_pretrained(tmp_path / "small")
    overrides = [f"init_from={tmp_path / 'small'}"]
    code, printed = refused(monkeypatch, capsys, arguments(shards, tmp_path / "out", *overrides))
    assert code == 2
    tokens = len(load_tokenizer("tiny"))
    assert f"init_from = '{tmp_path / 'small'}': vocabulary of 100 tokens" in printed
    assert f"data.tokenizer = 'tiny' has {tokens}" in printed


BROKEN_SCORES = """
import sys
sys.path.insert(0, {root!r})
import fvlm.evaluate.during_training
import launch.train

def figures(*_):
    raise {error}("mode coarse_fine: non-finite loss")

fvlm.evaluate.during_training.training_figures = figures
sys.argv = {command}
sys.exit(launch.train.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("error", ["ValueError", "KeyError"])
def test_scores_that_cannot_be_are_said_and_bugs_keep_their_traceback(shards, tmp_path, error):
    short = ["train.total_samples=20", "train.eval_every=1"]
    command = ["train.py", *arguments(shards, tmp_path, *short)]
    code = BROKEN_SCORES.format(root=str(ROOT), error=error, command=command)
    codes, printed = finish([Popen([sys.executable, "-c", code], stdout=PIPE, stderr=STDOUT, text=True)])
    assert codes == [1], printed
    expected = "train: evaluation after step 1: mode coarse_fine: non-finite loss\n"
    assert (expected in printed) == (error == "ValueError")
    assert ("Traceback" in printed) == (error == "KeyError")


def test_packs_that_ranks_do_not_divide_are_said_once(shards, tmp_path):
    codes, printed = finish(launch(arguments(shards, tmp_path, "train.packs_per_step=3"), world_size=2))
    assert codes == [2, 2], printed
    assert "train: train.packs_per_step = 3: expected a multiple of the 2 ranks; nearest: 4" in printed
