"""The published mathematics: losses, logits and gradients of the reference vectors, padded and packed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, LlamaConfig

from fvlm.model import FoveatedConfig, FoveatedVLM
from fvlm.model.convert import published_name
from fvlm.model.packed import SampleRows, assemble
from tests.model.samples import mixed

MODES = {"coarse_fine": "cf", "coarse_only": "co", "autoregressive": "ar"}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def vectors(shared_fixtures):
    return load_file(shared_fixtures / "reference" / "b1_t5_s17.safetensors")


@pytest.fixture(scope="module")
def config(shared_fixtures) -> FoveatedConfig:
    geometry = json.loads((shared_fixtures / "reference" / "config.json").read_text())
    llm = geometry["llm"]
    rope = {"rope_type": "default", "rope_theta": llm.pop("rope_theta")}
    return FoveatedConfig(
        llm_config=LlamaConfig(**llm, rope_parameters=rope),
        vision_config=Dinov2Config(**geometry["vision"]),
        query_dim=geometry["query_dim"],
        visual_scale=geometry["visual_scale"],
    )


@pytest.fixture(params=["weights.safetensors", "published_layout.pt"])
def model(request, shared_fixtures, config) -> FoveatedVLM:
    return FoveatedVLM.from_pretrained(shared_fixtures / "reference" / request.param, config=config)


def labels_of(vectors):
    return torch.where(vectors["loss_mask"] > 0, vectors["input_ids"], -100)


@pytest.mark.parametrize("mode", MODES)
def test_public_forward(model, vectors, mode):
    out = model(vectors["frames"].float(), vectors["input_ids"], labels=labels_of(vectors), mode=mode)
    expected = vectors[f"{MODES[mode]}_logits"]
    torch.testing.assert_close(out.loss, vectors[f"{MODES[mode]}_loss"], **TOLERANCE)
    torch.testing.assert_close(out.logits[:, -expected.shape[1] :], expected, **TOLERANCE)
    assert out.logits.shape == (1, 22, 512)


def test_public_gradients(model, vectors):
    model.train()
    model(vectors["frames"].float(), vectors["input_ids"], labels=labels_of(vectors)).loss.backward()
    check_gradients(model, vectors)


def check_gradients(model, vectors):
    grads = {published_name(name): p.grad for name, p in model.named_parameters()}
    names = [name.removeprefix("grad/") for name in vectors if name.startswith("grad/")]
    assert len(names) > 20
    for name in names:
        torch.testing.assert_close(grads[name], vectors[f"grad/{name}"], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def reference_rows(vectors) -> SampleRows:
    text = vectors["input_ids"][0].numpy()
    return SampleRows(
        token_ids=np.concatenate([np.zeros(5, int), text]),
        frame=np.concatenate([np.arange(5), np.full(len(text), -1)]),
        has_loss=np.concatenate([np.zeros(5, bool), vectors["loss_mask"][0].numpy() > 0]),
    )


@pytest.fixture
def packed_among_others(vectors):
    """The reference sample first, eight others of every layout behind it, unused rows at the end."""
    _, others, pixels = mixed(8, vocabulary=512, seed=3)
    shifted = [
        SampleRows(token_ids=r.token_ids, frame=np.where(r.frame >= 0, r.frame + 5, -1), has_loss=r.has_loss)
        for r in others
    ]
    frames = torch.cat([vectors["frames"][0].float(), torch.randn(len(pixels) + 2, 3, 56, 56)])
    rows = [reference_rows(vectors), *shifted]
    sizes = {
        "T": sum(len(r.token_ids) for r in rows) + 7,
        "V": sum(int((r.frame >= 0).sum()) for r in rows) + 3,
        "C": sum(len(r.token_ids) for r in rows),
        "S": len(rows) + 2,
        "K": sum(int(r.has_loss.sum()) for r in rows) + 4,
    }
    return assemble(rows, frames, sizes, max_seqlen=32)


@pytest.mark.parametrize("mode", MODES)
def test_packed_with_other_samples(model, vectors, packed_among_others, mode):
    out = model(batch=packed_among_others, mode=mode)
    position = (vectors["loss_mask"][0] > 0).nonzero().squeeze(1)
    logits = vectors[f"{MODES[mode]}_logits"][0, -17:]  # of the text tokens; each label is predicted one earlier
    expected = logits[position - 1].log_softmax(-1).gather(1, vectors["input_ids"][0, position, None]).squeeze(1)
    torch.testing.assert_close(out.logprobs[: len(position)], expected, **TOLERANCE)
    torch.testing.assert_close(-out.logprobs[: len(position)].mean(), vectors[f"{MODES[mode]}_loss"], **TOLERANCE)


def test_packed_gradients_of_one_sample_among_others(model, vectors, packed_among_others):
    model.train()
    own = int((vectors["loss_mask"] > 0).sum())
    (-model(batch=packed_among_others).logprobs[:own].mean()).backward()
    check_gradients(model, vectors)


def test_intermediate_tensors(model, vectors):
    frames = vectors["frames"][0].float()
    encoded = model.encoder(frames, coarse_query=model.q_static)
    for expected, got in [
        ("inter/k_first", encoded.layer_keys[0]),
        ("inter/k_last", encoded.layer_keys[-1]),
        ("inter/v_last", encoded.layer_values[-1]),
    ]:
        reference = vectors[expected]
        torch.testing.assert_close(got.flatten(2)[: len(reference)], reference, **TOLERANCE)
    scale = model.config.visual_scale
    coarse = scale * model.dino_to_llm(encoded.coarse)
    candidates = {"z": encoded.coarse, "token": coarse}
    close = [name for name, x in candidates.items() if x.shape[-1] == vectors["inter/z_coarse"].shape[-1]]
    assert close == ["z"]
    torch.testing.assert_close(encoded.coarse[None], vectors["inter/z_coarse"], **TOLERANCE)
