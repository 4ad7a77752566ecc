"""fVLM in lmms-eval: the class on the harness's own requests, and the harness itself on a task made here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fvlm.data.chat_writer import TURN_END
from fvlm.evaluate.items import Item
from fvlm.evaluate.multiple_choice import multiple_choice
from fvlm.evaluate.scoring import score
from fvlm.hub.opening import open_model
from fvlm.schema import ConfigError

PYTHON = os.environ.get("FVLM_LMMS_PYTHON", sys.executable)
"""Of an environment with lmms-eval and this project (docs/evaluation.md)."""
QUESTION = "Which shape is it?"
OPEN = {"tokenize": True, "add_generation_prompt": True}
OPTIONS = ["ring", "a large red circle", "bar"]
needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="no lmms-eval here: docs/evaluation.md says how to install it"
)


@pytest.fixture(scope="module")
def stills(picture, tmp_path_factory) -> list[Path]:
    """Two different ones."""
    other = tmp_path_factory.mktemp("more") / "other.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 90, 3), np.uint8)).save(other)
    return [picture, other]


@pytest.fixture(scope="module")
def written(exported, clip, stills) -> Callable:
    """written(media, question, **looking) -> what the product writes, at most six tokens."""
    opened = open_model(str(exported))
    end = opened.processor.tokenizer.convert_tokens_to_ids(TURN_END)

    def write(media: list, question: str = QUESTION, **looking) -> str:
        inputs = opened.processor.apply_chat_template(chat(media, clip, question), **OPEN)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
        rows = opened.model.generate(**inputs, **looking, **options)
        return opened.processor.decode(rows[0], skip_special_tokens=True).strip().split("\n\n")[0]

    return write


def chat(media: list[Path], clip: Path, question: str = QUESTION) -> list[dict]:
    parts = [{"type": "video" if path == clip else "image", "path": path} for path in media]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def choice_task(opened, shown: list[list[Path]], options=OPTIONS):
    """The product's own multiple choice about these media; the last option is right."""
    items = []
    for media in shown:
        read = [opened.processor.read(path) for path in media]
        frames = np.concatenate([frames for frames, _ in read])
        kind = "video" if not read[0][1] else "image" if len(read) == 1 else "images"
        meta = {"key": str(media[0]), "source": "here", "kind": kind, "frame_count": len(frames), "user": QUESTION}
        meta |= {"options": options, "answer": len(options) - 1, "assistant": options[-1]}
        frames = frames.transpose(0, 3, 1, 2)
        items.append(Item(meta=meta, num_frames=len(frames), read_frames=frames.copy))
    return multiple_choice(items, opened.processor.tokenizer, opened.presentation)


def log_likelihoods(opened, task, **looking) -> list[list[float]]:
    requests = [question.request for question in task.questions]
    scores, _ = score(opened.model, requests, presentation=opened.presentation, device="cpu", **looking)
    return [found.logprob.tolist() for found in scores]


# -- the class ----------------------------------------------------------------------------------------------------


@pytest.fixture
def harness(exported):
    """harness(documents, **model_args): the model as lmms-eval makes it, with a task's documents."""
    from lmms_eval.models import get_model

    def make(documents: list[dict], **arguments):
        text = ",".join(f"{name}={x}" for name, x in {"checkpoint": exported, "device": "cpu", **arguments}.items())
        model = get_model("fvlm").create_from_arg_string(text, {"batch_size": 2})
        model.task_dict["here"] = {"test": documents}
        return model

    return make


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The harness's errors."""
    from loguru import logger

    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}", level="ERROR")
    yield lines
    logger.remove(sink)


def request(kind: str, number: int, *arguments, repeats: int = 1):
    """An Instance as `ConfigurableTask.construct_requests` makes them."""
    from lmms_eval.api.instance import Instance

    metadata = {"task": "here", "doc_id": number, "repeats": repeats}
    return Instance(request_type=kind, arguments=(*arguments, number, "here", "test"), idx=0, metadata=metadata)


def visuals(document: dict) -> list:
    return document["visuals"]


@needs_lmms_eval
def test_answers_are_the_products_whatever_is_shown_and_however_batched(harness, written, clip, stills, monkeypatch):
    pictures = [Image.open(path).convert("RGB") for path in stills]
    shown = [[str(clip)], [pictures[0]], pictures, [str(stills[1])], [pictures], []]
    media = [[clip], [stills[0]], stills, [stills[1]], stills, []]
    model = harness([{"visuals": each} for each in shown], mode="coarse_fine", fine_iterations=2)
    greedy = {"max_new_tokens": 6, "temperature": 0, "until": ["\n\n"]}
    requests = [request("generate_until", n, QUESTION, dict(greedy), visuals) for n in range(len(shown))]
    looking = {"mode": "coarse_fine", "fine_iterations": 2}
    expected = [written(each, **looking) for each in media]
    generate, seen = model.model.generate, []
    monkeypatch.setattr(model.model, "generate", lambda **inputs: seen.append(inputs) or generate(**inputs))
    assert model.generate_until(requests) == expected
    assert len(seen) == 3
    for n, inputs in enumerate(seen):  # answers of random weights hardly tell the media apart
        files = model.processor.apply_chat_template([chat(each, clip) for each in media[2 * n : 2 * n + 2]], **OPEN)
        assert all(torch.equal(inputs[name], tensor) for name, tensor in files.items())
    requests[1].arguments[1]["until"] = expected[1][1:]
    assert model.generate_until(requests[:2]) == [expected[0], expected[1][0]]


@needs_lmms_eval
def test_what_cannot_be_shown_is_counted_and_disturbs_nothing_else(harness, written, clip, picture, tmp_path, log):
    (tmp_path / "notes.mp4").write_text("These are notes, and no video. " * 20)
    shown = [["nowhere.mp4"], [str(clip)], [str(tmp_path / "notes.mp4")], [str(clip), str(picture)], [{"array": 1}]]
    model = harness([{"visuals": each} for each in shown])
    requests = [request("generate_until", n, QUESTION, {"max_new_tokens": 6}, visuals) for n in range(len(shown))]
    assert model.generate_until(requests) == ["", written([clip]), "", "", ""]
    assert model.lost == {"missing_file": 1, "unknown_format": 1, "mixed_media": 1, "unknown_media": 1}
    assert log[0].startswith("here/0 cannot be shown: missing_file: nowhere.mp4 does not exist")
    assert [line.split()[0] for line in log[1:4]] == ["here/2", "here/3", "here/4"]
    assert log[4].startswith("4 questions could not be shown")
    choices = [request("loglikelihood", n, QUESTION, f" {option}", visuals) for n in (0, 1) for option in OPTIONS]
    with pytest.raises(ValueError, match=r"1 questions cannot be shown \(\{'missing_file': 1\}; named above\)"):
        model.loglikelihood(choices)


@needs_lmms_eval
@pytest.mark.parametrize("mode", ["coarse_only", "autoregressive"])
def test_likelihoods_are_those_of_multiple_choice(harness, exported, clip, stills, mode):
    opened, media = open_model(str(exported)), [[clip], [stills[0]], stills]
    model = harness([{"visuals": [str(path) for path in paths]} for paths in media], mode=mode)
    asked = [(n, option) for n in range(len(media)) for option in OPTIONS]
    found = model.loglikelihood([request("loglikelihood", n, QUESTION, f" {x}", visuals) for n, x in asked])
    expected = np.concatenate(log_likelihoods(opened, choice_task(opened, media), mode=mode))
    assert [-result.text[0] for result in found] == pytest.approx(expected, abs=1e-5)
    (target,) = model.loglikelihood([request("loglikelihood", 0, QUESTION, lambda document: "ring", visuals)])
    assert target.text == pytest.approx(found[0].text, abs=1e-5)


@needs_lmms_eval
def test_the_option_that_the_model_would_write_is_marked(harness, clip, monkeypatch):
    model = harness([{"visuals": [str(clip)]}])
    requests = [request("loglikelihood", 0, QUESTION, f" {option}", visuals) for option in OPTIONS]
    assert [result.text[1] for result in model.loglikelihood(requests)] == [False] * 3  # its weights are random
    tokenizer = model.processor.tokenizer
    for n, option in enumerate(OPTIONS):
        ids = tokenizer(option + TURN_END, add_special_tokens=False).input_ids
        ids = ids[: ids.index(tokenizer.convert_tokens_to_ids(TURN_END)) + 1]
        monkeypatch.setattr(model.model, "generate", lambda ids=ids, **_: torch.tensor([ids]))
        assert [result.text[1] for result in model.loglikelihood(requests)] == [m == n for m in range(3)]


@needs_lmms_eval
def test_rounds_go_on_until_the_task_ends_them(harness, written, clip, picture):
    model = harness([{"visuals": [str(clip)]}])

    def go_on(document, previous_output, round_idx, previous_round_info):
        assert len(previous_output) == round_idx
        assert previous_round_info == (None if round_idx == 1 else round_idx - 1)
        return [str(picture)], f"And after {previous_output[-1]!r}?", round_idx == 2, previous_output, round_idx

    instance = request("generate_until_multi_round", 0, QUESTION, {"max_new_tokens": 6}, visuals, go_on)
    first = written([clip])
    assert model.generate_until_multi_round([instance]) == [[first, written([picture], f"And after {first!r}?")]]


@needs_lmms_eval
def test_wrong_arguments_are_named(harness):
    for wrong, message in (
        ({"mode": "sideways"}, "mode=sideways: expected one of coarse_only"),
        ({"max_frames": 0}, "max_frames=0: expected a whole number"),
        ({"fine_iterations": "two"}, "fine_iterations=two"),
        ({"checkpoint": "nowhere"}, "nowhere"),
    ):
        with pytest.raises(ConfigError, match=message):
            harness([], **wrong)
    with pytest.raises(TypeError, match="frames_per_second"):
        harness([], frames_per_second=2)
    model = harness([{"visuals": []}])
    with pytest.raises(ValueError, match="acc_mutual_info"):
        model.loglikelihood([request("loglikelihood", 0)])


# -- the harness --------------------------------------------------------------------------------------------------

UTILS = """
from PIL import Image

def visuals(document):
    if document["kind"] == "video":
        return document["media"]
    return [Image.open(path).convert("RGB") for path in document["media"]]

def question(document):
    return document["question"]
"""


def write_task(folder: Path, name: str, documents: list[dict], **settings) -> None:
    (folder / "utils.py").write_text(UTILS)
    data = folder.parent / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_target": "answer",
        "metadata": {"version": 1.0},
        **settings,
    }
    functions = "doc_to_visual: !function utils.visuals\ndoc_to_text: !function utils.question\n"
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task) + functions)


def metric(name: str) -> list[dict]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True}]


@pytest.fixture
def run_harness(tmp_path):
    """run_harness(model_args, *tasks, processes=1) -> results, samples by task in order, and what was printed."""
    if subprocess.run([PYTHON, "-c", "import lmms_eval"], capture_output=True, check=False).returncode:
        pytest.skip(f"{PYTHON} has no lmms-eval: docs/evaluation.md says how to install it (FVLM_LMMS_PYTHON)")

    def run(model_args: str, *tasks: str, processes: int = 1) -> tuple[dict, dict[str, list[dict]], str]:
        out = tmp_path / "out"
        ranks = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        command = [PYTHON, "-m", *(ranks if processes > 1 else []), "lmms_eval", "--model", "fvlm"]
        command += [
            "--model_args",
            model_args,
            "--batch_size",
            "2",
            "--device",
            "cpu",
            "--include_path",
            str(tmp_path / "tasks"),
        ]
        command += ["--tasks", ",".join(tasks), "--output_path", str(out), "--log_samples"]
        offline = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        offline["ACCELERATE_USE_CPU"] = "true"
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **offline}, capture_output=True, text=True, check=False
        )
        said = done.stdout + done.stderr
        (results,) = [*out.rglob("*_results.json")] or pytest.fail(said)
        samples = {
            task: sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
            for task in tasks
            for file in out.rglob(f"*_samples_{task}.jsonl")
        }
        return json.loads(results.read_text()), samples, said

    (tmp_path / "tasks").mkdir()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_harness_itself_runs_an_exported_folder(run_harness, exported, written, clip, stills, tmp_path, processes):
    looking = {"mode": "coarse_fine", "fine_iterations": 2}
    media = {"video": [clip], "image": [stills[0]], "images": stills}
    said = {kind: written(paths, **looking) for kind, paths in media.items()}
    assert all(said.values())
    documents = [
        {"kind": kind, "media": [*map(str, paths)], "question": QUESTION, "answer": said[kind], "options": OPTIONS}
        for kind, paths in media.items()
    ]
    absent = {**documents[0], "media": [str(tmp_path / "absent.mp4")]}
    wrong = {**documents[1], "answer": "something else"}
    write_task(
        tmp_path / "tasks",
        "here_written",
        [documents[0], absent, *documents[1:], wrong],
        output_type="generate_until",
        generation_kwargs={"max_new_tokens": 6, "temperature": 0, "do_sample": False},
        metric_list=metric("exact_match"),
    )
    opened = open_model(str(exported))
    task = choice_task(opened, [[clip], [stills[0]], stills])
    answers, _ = task.run(opened.model, device="cpu", **looking)
    right = [0, answers[1].choices[0], 2]  # so that neither none nor all need be right
    write_task(
        tmp_path / "tasks",
        "here_choice",
        [{**document, "answer": index} for document, index in zip(documents, right, strict=True)],
        output_type="multiple_choice",
        doc_to_choice="options",
        metric_list=metric("acc"),
    )
    results, samples, printed = run_harness(
        f"checkpoint={exported},mode=coarse_fine,fine_iterations=2", "here_written", "here_choice", processes=processes
    )
    assert results["results"]["here_written"]["exact_match,none"] == pytest.approx(3 / 5)
    answered = [sample["filtered_resps"] for sample in samples["here_written"]]
    assert answered == [said["video"], "", said["image"], said["images"], said["image"]]
    if processes == 1:  # the first process's own: one of those written, none of those chosen from
        assert results["throughput"]["avg_not_shown"] == 0.5
    assert f"missing_file: {tmp_path / 'absent.mp4'} does not exist" in printed
    accuracy = np.mean([answer.choices[0] == index for answer, index in zip(answers, right, strict=True)])
    assert accuracy > 0
    assert results["results"]["here_choice"]["acc,none"] == pytest.approx(accuracy)
    found = [[-float(value) for value, _ in sample["filtered_resps"]] for sample in samples["here_choice"]]
    np.testing.assert_allclose(found, log_likelihoods(opened, task, **looking), atol=1e-5)


@pytest.mark.slow
def test_the_harness_itself_runs_a_run(run_harness, run, clip, tmp_path):
    document = {"kind": "video", "media": [str(clip)], "question": QUESTION, "answer": "ring"}
    settings = {"output_type": "generate_until", "generation_kwargs": {"max_new_tokens": 6, "until": ["\n"]}}
    write_task(tmp_path / "tasks", "here_run", [document], **settings, metric_list=metric("exact_match"))
    _, samples, _ = run_harness(f"checkpoint={run},tokenizer=tiny,max_frames=2", "here_run")
    opened = open_model(str(run), "tiny")
    opened.processor.max_frames = 2
    inputs = opened.processor(videos=clip, text=QUESTION)
    rows = opened.model.generate(**inputs, mode="autoregressive", max_new_tokens=6, do_sample=False)
    expected = opened.processor.decode(rows[0], skip_special_tokens=True).strip().split("\n")[0]
    assert [sample["filtered_resps"] for sample in samples["here_run"]] == [expected]
