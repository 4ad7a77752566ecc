"""Generating text and watching streams, against the same computation without a cache."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from fvlm.model import FoveatedVLM, build_model, tiny_config
from fvlm.model.cache import GrowingCache
from fvlm.model.padded import pack_padded
from fvlm.model.stream import FoveatedStream

VOCABULARY = 64
FRAME = (3, 56, 56)


@pytest.fixture(scope="module")
def model() -> FoveatedVLM:
    torch.manual_seed(3)
    return build_model(tiny_config(VOCABULARY)).double().eval()


def frames_and_ids(num_frames: int, num_ids: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    frames = torch.randn(1, num_frames, *FRAME, generator=random, dtype=torch.float64)
    return frames, torch.randint(3, VOCABULARY, (1, num_ids), generator=random)


def greedy(model, frames, ids, new_tokens: int, **arguments) -> tuple[list[int], torch.Tensor]:
    """The definition: the whole computation again for every token, without any cache; tokens, and their logits."""
    tokens, logits = [], []
    for _ in range(new_tokens):
        out = model(frames, ids, **arguments).logits[0, -1]
        tokens.append(int(out.argmax()))
        logits.append(out)
        ids = torch.cat([ids, out.argmax().view(1, 1)], dim=1)
    return tokens, torch.stack(logits)


class Logits(LogitsProcessor):
    """Keeps what `generate` chooses from."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(scores[0])
        return scores


OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("mode", ["coarse_only", "coarse_fine", "autoregressive"])
@torch.no_grad()
def test_generated_tokens_are_those_of_the_uncached_computation(model, mode):
    frames, ids = frames_and_ids(4, 5)
    expected, logits = greedy(model, frames, ids, 6, mode=mode)
    found = Logits()
    got = model.generate(
        frames, ids, mode=mode, max_new_tokens=6, logits_processor=LogitsProcessorList([found]), **OPTIONS
    )
    assert got[0].tolist() == expected
    torch.testing.assert_close(
        torch.stack(found.seen), logits.float(), rtol=0, atol=1e-6
    )  # `generate` chooses in float32


@torch.no_grad()
def test_a_batch_of_unequal_samples_generates_what_each_does_alone(model):
    samples = [(3, 7, 0), (5, 4, 2), (1, 6, 6), (0, 5, 0)]  # frames, text tokens, text before the frames
    drawn = [frames_and_ids(n, length, seed) for seed, (n, length, _) in enumerate(samples)]
    alone = [
        model.generate(*one, max_new_tokens=5, visual_at=torch.tensor([at]), **OPTIONS)[0].tolist()
        for one, (_, _, at) in zip(drawn, samples, strict=True)
    ]
    frames, ids = torch.zeros(4, 5, *FRAME, dtype=torch.float64), torch.zeros(4, 7, dtype=torch.int64)
    frame_mask, mask = torch.zeros(4, 5, dtype=torch.bool), torch.zeros(4, 7, dtype=torch.bool)
    for b, ((x, text), (n, length, _)) in enumerate(zip(drawn, samples, strict=True)):
        frames[b, :n], ids[b, :length], frame_mask[b, :n], mask[b, :length] = x[0], text[0], True, True
    together = model.generate(
        frames, ids, attention_mask=mask, frame_mask=frame_mask, visual_at=torch.tensor([a for *_, a in samples]),
        max_new_tokens=5, **OPTIONS,
    )  # fmt: skip
    assert together.tolist() == alone
    assert len({tuple(tokens) for tokens in alone}) > 1  # the samples differ, so that mixing them up would show


@torch.no_grad()
def test_generate_takes_transformers_options(model):
    frames, ids = frames_and_ids(2, 4)
    beams = model.generate(
        frames, ids, max_new_tokens=3, num_beams=3, num_return_sequences=2, eos_token_id=None, pad_token_id=0
    )
    assert beams.shape == (2, 3)
    stop = int(model.generate(frames, ids, max_new_tokens=1, **OPTIONS)[0, 0])
    stopped = model.generate(frames, ids, max_new_tokens=9, do_sample=False, eos_token_id=stop, pad_token_id=0)
    assert stopped.tolist() == [[stop]]
    with pytest.raises(ValueError, match="mode='look'"):
        model.generate(frames, ids, mode="look")


@torch.no_grad()
def test_the_multi_token_model_generates_too():
    torch.manual_seed(5)
    model = build_model(tiny_config(VOCABULARY, architecture="multi_token", grid=4)).double().eval()
    frames, ids = frames_and_ids(2, 4)
    expected, _ = greedy(model, frames, ids, 4)
    assert model.generate(frames, ids, max_new_tokens=4, **OPTIONS)[0].tolist() == expected
    with pytest.raises(ValueError, match="multi-token"):
        FoveatedStream(model)


@torch.no_grad()
def test_tokens_of_another_dtype_than_the_rows_are_taken(model, monkeypatch):
    """As under autocast on a GPU, whose `index_copy` does not turn one into the other."""
    frames, ids = frames_and_ids(3, 4)
    expected = model(frames, ids, mode="autoregressive").logits
    to_llm = model.to_llm
    monkeypatch.setattr(model, "to_llm", lambda z: to_llm(z).float())
    torch.testing.assert_close(model(frames, ids, mode="autoregressive").logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_packed_passes_are_the_same_after_generating(model):
    frames, ids = frames_and_ids(2, 4)
    before = model(frames, ids).logits
    model.generate(frames, ids, max_new_tokens=2, **OPTIONS)
    torch.testing.assert_close(model(frames, ids).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("prompt", [0, 3])
@torch.no_grad()
def test_a_stream_answers_as_the_whole_video_does_at_any_time_again_and_again(model, prompt):
    frames, ids = frames_and_ids(11, prompt + 5)
    stream = FoveatedStream(model, prompt_ids=ids[0, :prompt] if prompt else None)
    for begin, end in ((0, 1), (1, 3), (3, 11)):
        stream.push(frames[0, begin:end])
        at = torch.tensor([prompt])
        expected = model.generate(frames[:, :end], ids, visual_at=at, max_new_tokens=4, **OPTIONS)[0].tolist()
        for _ in range(2):
            assert stream.ask(ids[0, prompt:], max_new_tokens=4, **OPTIONS).tolist() == expected
    assert stream.frames_seen == 11


@torch.no_grad()
def test_a_streams_maps_are_the_autoregressive_modes(model):
    frames, ids = frames_and_ids(5, 3)
    batch = pack_padded(model.config, frames, ids).batch
    expected = model.attention_maps(batch, mode="autoregressive")
    torch.testing.assert_close(FoveatedStream(model).push(frames[0], maps=True), expected, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_a_bounded_memory_sees_the_prompt_and_the_newest_tokens(model):
    """Against full attention over every token so far under a mask that leaves out what was forgotten."""
    memory, num_frames = 4, 11
    frames, ids = frames_and_ids(num_frames, 6)
    prompt, question = ids[0, :2], ids[0, 2:]
    stream = FoveatedStream(model, memory=memory, prompt_ids=prompt)
    rows = model.llm.get_input_embeddings()(prompt)
    encoded = model.encoder(frames[0])

    def hidden(rows: torch.Tensor) -> torch.Tensor:
        n = len(rows)
        row, column = torch.arange(n)[:, None], torch.arange(n)[None]
        visible = (column <= row) & ((column < len(prompt)) | (column > row - memory))
        asked = row >= len(prompt) + num_frames  # text after the frames sees the newest tokens, and itself
        visible |= asked & (column <= row) & (column >= len(prompt) + num_frames - memory)
        visible &= ~(asked & (column >= len(prompt)) & (column < len(prompt) + num_frames - memory))
        return model.llm.model(inputs_embeds=rows[None], attention_mask=visible[None, None]).last_hidden_state[0]

    for t in range(num_frames):
        query = model.llm_to_query(hidden(rows)[-1:])
        rows = torch.cat([rows, model.to_llm(model.encoder.look(query, encoded, torch.tensor([t])).z)])
    stream.push(frames[0])
    after = torch.cat([rows, model.llm.get_input_embeddings()(question)])
    expected = model.llm.lm_head(hidden(after)[-1])
    found = Logits()
    stream.ask(question, max_new_tokens=1, logits_processor=LogitsProcessorList([found]), **OPTIONS)
    torch.testing.assert_close(found.seen[0], expected.float(), rtol=0, atol=1e-6)
    assert stream._cache.get_seq_length() == len(prompt) + memory


@torch.no_grad()
def test_a_long_stream_keeps_its_memory(model):
    stream = FoveatedStream(model, memory=70)
    stream.push(torch.rand(200, *FRAME, dtype=torch.float64))
    rooms = {layer._room[0].shape[-2] for layer in stream._cache.layers}
    assert stream._cache.get_seq_length() == 70
    assert max(rooms) <= 2 * 70
    assert len(stream.ask(torch.tensor([5, 6]), max_new_tokens=3, **OPTIONS)) == 3


def test_bad_questions_are_refused(model):
    stream = FoveatedStream(model)
    with pytest.raises(ValueError, match="at least one token"):
        stream.ask(torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="memory=0"):
        FoveatedStream(model, memory=0)


def test_a_fork_leaves_its_origin_alone():
    origin = GrowingCache(1)
    layer, one = origin.layers[0], torch.ones(1, 1, 1, 2)
    for value in range(3):
        layer.update(value * one, value * one)
    fork = origin.fork()
    fork.layers[0].update(9 * one, 9 * one)
    layer.update(3 * one, 3 * one)
    assert layer.keys[0, 0, :, 0].tolist() == [0, 1, 2, 3]
    assert fork.layers[0].keys[0, 0, :, 0].tolist() == [0, 1, 2, 9]
    origin.put_next_into(1)
    layer.update(7 * one, 7 * one)
    assert layer.values[0, 0, :, 0].tolist() == [0, 7, 2, 3]
