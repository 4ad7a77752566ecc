"""Part by part: what was found is kept and not asked again, in one ordering and in two."""

from __future__ import annotations

import json
from argparse import Namespace
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fvlm.data.errors import SampleError
from fvlm.evaluate.asking import Questions, add_samples, evaluate_modes, gaps, ordering_table
from fvlm.evaluate.multiple_choice import ChoiceTask, multiple_choice, slots
from fvlm.evaluate.progress import resume
from fvlm.evaluate.statistics import bootstrap_interval
from launch.evaluate import identity


@pytest.fixture
def asked(questions, listings, tokenizer, presentation) -> Questions:
    tasks = (multiple_choice(questions, tokenizer, presentation), slots(listings, tokenizer, presentation))
    return Questions(benchmarks=tasks)


def test_a_stopped_evaluation_goes_on_with_what_is_missing(asked, model, monkeypatch, tmp_path):
    whole = evaluate_modes(asked, model, ["coarse_only", "coarse_fine"])
    path, identity, saved = tmp_path / "evaluation.json", {"checkpoint": "c", "data": "d"}, []
    record = resume(path, identity)

    def stop_after_three() -> None:
        path.write_text(json.dumps(record))
        saved.append(1)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_modes(asked, model, ["coarse_only", "coarse_fine"], record=record, save=stop_after_three)
    run, ran = ChoiceTask.run, []
    monkeypatch.setattr(
        ChoiceTask, "run", lambda self, *a, **k: (ran.append((self.name, k["mode"])), run(self, *a, **k))[1]
    )
    again = evaluate_modes(asked, model, ["coarse_only", "coarse_fine"], record=resume(path, identity))
    assert ran == [("slots", "coarse_fine")]
    assert {name: again[name] for name in whole} == json.loads(json.dumps(whole))
    assert again["identity"] == identity


def test_another_tokenizer_is_something_else_and_the_runs_own_goes_without_saying(tokenizer, tmp_path):
    for name in ("a", "b"):
        other = deepcopy(tokenizer)
        other.add_tokens([f"<{name}>"])
        other.save_pretrained(tmp_path / name)
    (tmp_path / "weights").write_bytes(b"w")
    checkpoint = SimpleNamespace(weights=str(tmp_path / "weights"), config=SimpleNamespace(tokenizer="tiny"))
    names = ("samples", "questions", "tokens", "dtype", "answers", "new_tokens")

    def arguments(given: str | None) -> dict:
        args = Namespace(**dict.fromkeys(names), orderings=["video_first"], tokenizer=given)
        return identity(args, checkpoint, Questions(), 1)["arguments"]

    own, a, b = (arguments(given) for given in (None, str(tmp_path / "a"), str(tmp_path / "b")))
    assert own == arguments("tiny") == {**dict.fromkeys(names), "fine_iterations": 1, "ordering": "video_first"}
    assert own != a != b != own


def test_a_record_of_something_else_is_not_gone_on_with(tmp_path, caplog):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"identity": {"checkpoint": "a", "data": "d"}, "modes": {"coarse_fine": {}}}))
    assert resume(path, {"checkpoint": "b", "data": "d"}) == {"identity": {"checkpoint": "b", "data": "d"}}
    with caplog.at_level("INFO"):
        resume(path, {"checkpoint": "b", "data": "d"})
    assert "holds another checkpoint" in caplog.text
    assert "modes" in resume(path, {"checkpoint": "a", "mvbench": "m"}), "what is added may be new"
    assert resume(path, {"checkpoint": "a"}, restart=True) == {"identity": {"checkpoint": "a"}}
    for content in ("{", "[]", '{"modes": {}}'):
        path.write_text(content)
        assert resume(path, {"checkpoint": "a"}) == {"identity": {"checkpoint": "a"}}
        assert "holds nothing to go on with" in caplog.text
        caplog.clear()


def test_samples_keep_their_questions_in_every_mode():
    def records(choice, keys):
        return [{"key": k, "source": k[0], "question": "q", "gold": "g", "choice": choice} for k in keys]

    samples: list = []
    keys = [f"{source}{n}" for source in "ab" for n in range(5)]
    add_samples(samples, "mc", "coarse_only", records("x", keys))
    add_samples(samples, "slots", "coarse_only", records("z", ["a0"]))
    add_samples(samples, "mc", "coarse_fine", records("y", keys[1:]))
    assert [sample["key"] for sample in samples] == ["a0", "b0", "a1", "b1", "a2", "b2", "a0"]
    assert samples[0]["choices"] == {"coarse_only": "x"}
    assert samples[1]["choices"] == {"coarse_only": "x", "coarse_fine": "y"}
    assert samples[-1]["choices"] == {"coarse_only": "z"}


def test_the_table_of_modes_and_orderings():
    def parts(loss, accuracy):
        return {"loss": {"loss": loss}, "seconds_per_sample": 0.1, "pope": {"overall": {"accuracy": accuracy}}}

    found = ordering_table(
        {
            "video_first": {"coarse_only": parts(2.0, 0.5), "coarse_fine": parts(1.5, 0.6)},
            "question_first": {"coarse_fine": {**parts(1.2, 0.7), "captions": {"cider": 0.3}}},
        }
    )
    assert found == [
        ("loss", "video_first", {"coarse_only": 2.0, "coarse_fine": 1.5}),
        ("loss", "question_first", {"coarse_fine": 1.2}),
        ("pope", "video_first", {"coarse_only": 0.5, "coarse_fine": 0.6}),
        ("pope", "question_first", {"coarse_fine": 0.7}),
        ("captions", "question_first", {"coarse_fine": 0.3}),
    ]


def test_a_task_without_an_answer_has_no_gap():
    answered, none = {"pope": {"overall": {"accuracy": 0.5}}}, {"pope": {"overall": {"asked": 3}}}
    assert gaps({"coarse_fine": answered, "autoregressive": none}) == {}


def test_unreadable_questions_are_no_samples(asked, questions, tokenizer, presentation, model):
    def broken():
        raise SampleError("bad_jpeg", "cut short")

    hurt = [replace(questions[0], read_frames=broken), *questions[1:]]
    found = evaluate_modes(
        Questions(benchmarks=[multiple_choice(hurt, tokenizer, presentation)]), model, ["coarse_fine"]
    )
    assert found["modes"]["coarse_fine"]["multiple_choice"]["skipped"] == {"bad_jpeg": 1}
    assert "item-1" not in {sample["key"] for sample in found["samples"]}


def test_intervals_of_token_means_weigh_samples_by_their_tokens():
    low, high = bootstrap_interval([10.0, 1.0] * 50, [10, 1] * 50)
    assert low == high == 1.0
    low, high = bootstrap_interval([0.0, 1.0] * 200)
    spread = 1.96 * 0.5 / 400**0.5
    assert (low, high) == (pytest.approx(0.5 - spread, abs=0.01), pytest.approx(0.5 + spread, abs=0.01))
