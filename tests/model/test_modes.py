"""Relations between modes, iterations, layouts and architectures that hold by definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fvlm.model import FoveatedVLM, MultiTokenVLM, build_model, tiny_config
from fvlm.model.encoder import PIXEL_MEAN, PIXEL_STD, projections
from tests.model.samples import alone, mixed, pack

VOCABULARY = 64


@pytest.fixture(scope="module")
def model() -> FoveatedVLM:
    torch.manual_seed(1)
    return build_model(tiny_config(VOCABULARY)).double().eval()


def uncached_autoregressive(model, batch):
    """The definition in docs/model.md without a cache: the prefix again for every visual token, in sequence order."""
    text = model.llm.get_input_embeddings()(batch.token_ids)
    encoded = model.encoder(batch.frames)
    tokens = text.new_zeros(len(batch.visual_index), text.shape[1])
    real = [v for v in batch.visual_index.argsort().tolist() if batch.visual_index[v] < batch.cu_seqlens[-1]]
    for v in real:
        queries = model.write_queries(batch, model.prefix_hidden_states(batch, text, tokens))
        seen = model.encoder.look(queries[v : v + 1], encoded, batch.visual_frame[v : v + 1]).z
        tokens = tokens.index_copy(0, torch.tensor([v]), model.to_llm(seen))
    return model._loss(batch, model.hidden_states(batch, text, tokens)).logprobs


def test_cached_autoregression_equals_the_uncached_one(model):
    _, rows, frames = mixed(8, VOCABULARY)
    batch = pack(rows, frames, spare=3)
    with torch.no_grad():
        expected = uncached_autoregressive(model, batch)
        got = model(batch=batch, mode="autoregressive").logprobs
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_one_frame_autoregressive_equals_coarse_fine(model):
    _, rows, frames = mixed(8, VOCABULARY)
    one = alone(rows[6], frames)
    results = [model(batch=one, mode=mode).loss_sum.item() for mode in ("coarse_fine", "autoregressive")]
    assert results[0] == pytest.approx(results[1], rel=1e-12)


def test_as_many_iterations_as_frames_reach_the_autoregressive_result(model):
    """Iteration k makes the first k tokens what deployment sees, by induction over causality."""
    _, rows, frames = mixed(1, VOCABULARY)  # five frames
    batch = pack(rows, frames)
    target = model(batch=batch, mode="autoregressive").loss_sum.item()
    gaps = [abs(model(batch=batch, fine_iterations=k).loss_sum.item() - target) for k in (1, 5)]
    assert gaps[1] < 1e-9 < gaps[0]


def test_coarse_loss_is_the_coarse_modes_loss(model):
    _, rows, frames = mixed(8, VOCABULARY)
    batch = pack(rows, frames)
    out = model(batch=batch, coarse_loss=True)
    assert out.coarse_loss_sum.item() == pytest.approx(
        model(batch=batch, mode="coarse_only").loss_sum.item(), rel=1e-12
    )
    assert out.coarse_loss_sum.item() != pytest.approx(out.loss_sum.item(), rel=1e-6)


def test_riding_along_equals_looking_afterwards(model):
    frames = torch.randn(3, 3, 56, 56, dtype=torch.float64)
    encoded = model.encoder(frames, coarse_query=model.q_static)
    afterwards = model.encoder.look(model.q_static.expand(3, -1), encoded, torch.arange(3)).z
    torch.testing.assert_close(encoded.coarse, afterwards, rtol=0, atol=1e-12)


def test_patches_are_dinov2s_own(model):
    """Our walk over the blocks gives the features of the untouched Dinov2Model, rider or not."""
    frames = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    expected = model.encoder.dino(frames).last_hidden_state
    for query in (None, model.q_static):
        got = model.encoder(frames, coarse_query=query, features=True).features
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [56, 84])
def test_folded_normalisation_equals_normalised_frames(model, side):
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))
    torch.testing.assert_close(model.encoder.embed(pixels), model.encoder.embed((pixels.double() / 255 - mean) / std))


def test_entropy_and_heat_maps_agree(model):
    _, rows, frames = mixed(8, VOCABULARY)
    batch = pack(rows, frames)
    for mode in ("coarse_fine", "coarse_only", "autoregressive"):
        maps = model.attention_maps(batch, mode).double()
        assert maps.shape == (len(batch.visual_index), 4, 3, 17)
        used = batch.visual_index < batch.cu_seqlens[-1]
        torch.testing.assert_close(maps[used].sum(-1), torch.ones_like(maps[used].sum(-1)), rtol=0, atol=1e-5)
        entropy = -(maps[used] * maps[used].log()).sum(-1).mean((1, 2))
        got = model(batch=batch, mode=mode, entropy=True).attention_entropy
        torch.testing.assert_close(got[used], entropy, rtol=1e-4, atol=1e-5)


def test_temperature_scales_the_logits_of_queries_only():
    torch.manual_seed(0)
    plain = build_model(tiny_config(VOCABULARY)).double()
    sharp = build_model(tiny_config(VOCABULARY, query_logit_scale=2.0)).double()
    sharp.load_state_dict(plain.state_dict())
    frames = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    outs = [m.encoder(frames, coarse_query=m.q_static, features=True) for m in (plain, sharp)]
    torch.testing.assert_close(outs[0].features, outs[1].features, rtol=0, atol=0)
    assert not torch.allclose(outs[0].coarse, outs[1].coarse)
    rider = sharp.encoder.look(sharp.q_static.expand(2, -1), outs[1], torch.arange(2)).z
    torch.testing.assert_close(outs[1].coarse, rider, rtol=0, atol=1e-12)


def test_shallow_query_is_one_plain_attention_over_final_features():
    torch.manual_seed(0)
    model = build_model(tiny_config(VOCABULARY, deep_query=False)).double()
    frames = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    layer = model.encoder.dino.encoder.layer[-1]
    features = layer.norm1(model.encoder.dino(frames).last_hidden_state)
    linears = projections(layer)
    key, value = (linear(features).view(2, 17, 3, 32) for linear in (linears.k, linears.v))
    u = model.encoder.query_input_proj(model.q_static).view(3, 32)
    weights = (torch.einsum("hk,fnhk->fhn", u, key) / 32**0.5).softmax(-1)
    seen = torch.einsum("fhn,fnhk->fhk", weights, value).flatten(1)
    expected = model.encoder.output_proj(model.encoder.dino.layernorm(seen))
    torch.testing.assert_close(model.encoder(frames, coarse_query=model.q_static).coarse, expected)


@pytest.mark.parametrize("grid", [1, 4, 16])
def test_multi_token_slots_hold_pooled_cells_row_major(grid):
    torch.manual_seed(0)
    config = tiny_config(VOCABULARY, architecture="multi_token", grid=grid)
    model = build_model(config).double()
    assert isinstance(model, MultiTokenVLM)
    frames = torch.randn(1, 2, 3, 56, 56, dtype=torch.float64)
    ids = torch.randint(3, VOCABULARY, (1, 6))
    out = model(frames, ids, labels=ids)
    features = model.encoder.dino(frames[0]).last_hidden_state[:, 1:].view(2, 4, 4, -1)
    side, step = int(grid**0.5), 4 // int(grid**0.5)
    cells = [
        features[f, r * step : (r + 1) * step, c * step : (c + 1) * step].mean((0, 1))
        for f in range(2)
        for r in range(side)
        for c in range(side)
    ]
    visual = 0.14 * model.dino_to_llm(model.encoder.output_proj(torch.stack(cells)))
    embeds = torch.cat([visual, model.llm.model.embed_tokens(ids[0])])[None]
    model.llm.config._attn_implementation = "sdpa"
    logits = model.llm(inputs_embeds=embeds).logits
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-10)
    assert out.loss.item() == pytest.approx(F.cross_entropy(logits[0, 2 * grid : -1], ids[0, 1:]).item())


def test_padding_of_the_padded_form_changes_nothing(model):
    frames = torch.randn(2, 4, 3, 56, 56, dtype=torch.float64)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    frame_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    text_mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4]).bool()
    together = model(frames, ids, attention_mask=text_mask, labels=ids.where(text_mask, -100), frame_mask=frame_mask)
    single = model(frames[1:, :2], ids[1:, :5], labels=ids[1:, :5])
    torch.testing.assert_close(together.logits[1, :7], single.logits[0], rtol=0, atol=1e-10)
    assert together.logits[1, 7:].abs().max() == 0
    with pytest.raises(ValueError, match="padding must be at the end"):
        model(frames, ids, attention_mask=~text_mask)


def test_question_first_lets_the_question_write_the_first_look(model):
    frames = torch.randn(1, 2, 3, 56, 56, dtype=torch.float64)
    first, second = torch.randint(3, VOCABULARY, (2, 1, 6)).unbind(0)
    second[:, 3:] = first[:, 3:]  # the same tail, another question
    at = torch.tensor([3])
    logits = [model(frames, ids, visual_at=at).logits for ids in (first, second)]
    assert logits[0].shape == (1, 8, VOCABULARY)
    assert not torch.allclose(logits[0][:, 3], logits[1][:, 3])


def test_wrong_calls_are_explained(model):
    with pytest.raises(ValueError, match="mode='fine'"):
        model(torch.zeros(1, 1, 3, 56, 56), torch.zeros(1, 2).long(), mode="fine")
    with pytest.raises(ValueError, match="fine_iterations=0"):
        model(torch.zeros(1, 1, 3, 56, 56), torch.zeros(1, 2).long(), fine_iterations=0)
    with pytest.raises(ValueError, match="needs frames and input_ids"):
        model(input_ids=torch.zeros(1, 2).long())
