"""The exported folder where this project is not: loaded by transformers' auto classes in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fvlm.data.tiny_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS
from fvlm.model.stream import FoveatedStream
from launch.import_published import main as import_published
from tests.conftest import SHARED_FIXTURES

REFERENCE = SHARED_FIXTURES / "reference"
MODES = {"coarse_fine": "cf", "coarse_only": "co", "autoregressive": "ar"}
SCRIPT = Path(__file__).with_name("stand_alone.py")


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory) -> Path:
    """A byte-level tokenizer of 259 tokens: the reference model has room for 512."""
    words = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end, bos, eos = SPECIAL_TOKENS
    named = {"unk_token": end, "bos_token": bos, "eos_token": eos, "pad_token": eos}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **named)
    folder = tmp_path_factory.mktemp("byte-tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(exported, model, clip, picture, byte_tokenizer, tmp_path_factory) -> dict:
    """What the folders said; the published file's among them where it is at hand."""
    folder = tmp_path_factory.mktemp("elsewhere")
    torch.manual_seed(1)
    inputs = {"frames": torch.rand(2, 3, 3, 56, 56), "input_ids": torch.randint(3, 800, (2, 9))}
    torch.save(inputs, folder / "inputs.pt")
    stranger = shutil.copytree(exported, folder / "1st.model-copy")  # a name that is no Python identifier
    tiny = {"folder": stranger, "inputs": folder / "inputs.pt", "again": folder / "again"}
    jobs = {"tiny": {**tiny, "clip": clip, "picture": picture}}
    if REFERENCE.is_dir():
        vectors = load_file(REFERENCE / "b1_t5_s17.safetensors")
        torch.save({"frames": vectors["frames"].float(), "input_ids": vectors["input_ids"]}, folder / "vectors.pt")
        arguments = [REFERENCE / "published_layout.pt", "--config", REFERENCE / "config.json"]
        arguments += ["--tokenizer", byte_tokenizer, "--out", folder / "published"]
        assert import_published([str(argument) for argument in arguments]) == 0
        jobs["published"] = {"folder": folder / "published", "inputs": folder / "vectors.pt"}
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    environment = {name: x for name, x in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    subprocess.run(
        [sys.executable, "-P", str(SCRIPT), "jobs.json", "results.pt"],
        cwd=folder,
        env={**environment, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    return {"asked": inputs, **torch.load(folder / "results.pt")}


def test_nothing_of_the_project_was_there(results):
    assert results["at hand"] == []
    assert not any(results["tiny"]["notes"].values())
    assert results["tiny"]["class"] == "FoveatedModel"


def test_all_modes_are_the_products(results, model):
    for mode in MODES:
        with torch.no_grad():
            expected = model(**results["asked"], mode=mode).logits
        torch.testing.assert_close(results["tiny"]["logits"][mode], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "picture"])
def test_a_video_and_a_picture_are_described_as_by_the_product(results, model, processor, clip, picture, kind):
    media = {"clip": {"videos": clip}, "picture": {"images": picture}}[kind]
    inputs = processor(text="What is in the middle?", **media)
    said = results["tiny"][kind]
    assert inputs.keys() == said["inputs"].keys()
    assert all(torch.equal(x, said["inputs"][name]) for name, x in inputs.items())
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(said["tokens"], tokens)
    assert said["text"] == processor.batch_decode(tokens, skip_special_tokens=True)


def test_a_stream_of_frames_is_answered_as_by_the_product(results, model):
    inputs = results["tiny"]["clip"]["inputs"]
    watching = FoveatedStream(model)
    watching.push(inputs["frames"][0])
    expected = watching.ask(inputs["input_ids"][0], max_new_tokens=6, do_sample=False)
    assert torch.equal(results["tiny"]["stream"], expected)


def test_what_transformers_saves_again_loads_again_in_bfloat16(results):
    for mode, logits in results["tiny"]["logits"].items():
        again = results["tiny"]["again"][mode]
        assert again.dtype == torch.bfloat16
        assert (again.float() - logits).norm() < 0.05 * logits.norm()


@pytest.mark.parametrize("mode", MODES)
def test_the_published_file_gives_the_published_figures(results, mode):
    if "published" not in results:
        pytest.skip(f"no {REFERENCE}: the published vectors are not at hand")
    expected = load_file(REFERENCE / "b1_t5_s17.safetensors")[f"{MODES[mode]}_logits"]
    logits = results["published"]["logits"][mode][:, -expected.shape[1] :]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(results["published"]["notes"].values())
