"""Media and questions as the model takes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fvlm.data.chat import Layout, Text, segments
from fvlm.data.errors import MediaError
from fvlm.data.video import read_media
from fvlm.hub.opening import processor_for
from fvlm.hub.processing import FoveatedProcessor
from fvlm.model import tiny_config
from fvlm.schema import ConfigError

QUESTION = "Which shape is <|im_end|> in the middle?"


def trained_prompt(tokenizer, layout: Layout, **meta) -> list[list[int]]:
    """Text segments of a training sample, up to where its last answer begins."""
    meta = {"kind": "video", "frame_count": 4, "user": QUESTION, "assistant": "ring", **meta}
    texts = [part for part in segments(meta, tokenizer, layout) if isinstance(part, Text)]
    begins = np.flatnonzero(np.diff(texts[-1].is_answer.astype(int)) == 1)[-1] + 1
    return [*(text.token_ids.tolist() for text in texts[:-1]), texts[-1].token_ids[:begins].tolist()]


def test_the_question_is_written_as_in_training(processor, tokenizer, clip):
    (expected,) = trained_prompt(tokenizer, Layout.VIDEO_FIRST)
    inputs = processor(videos=clip, text=QUESTION)
    assert inputs["input_ids"][0].tolist() == expected
    assert inputs["visual_at"].tolist() == [0]
    head, tail = trained_prompt(tokenizer, Layout.QUESTION_FIRST)
    directed = processor_for(tiny_config(len(tokenizer)), "tiny", question_first=True)(videos=clip, text=QUESTION)
    assert directed["input_ids"][0].tolist() == [*head, *tail]
    assert directed["visual_at"].tolist() == [len(head)]


def test_a_chat_of_several_turns_is_written_as_in_training(processor, tokenizer, clip):
    turns = [{"user": QUESTION, "assistant": "ring"}, {"user": "Why?", "assistant": "x"}]
    (expected,) = trained_prompt(tokenizer, Layout.VIDEO_FIRST, turns=turns)
    chat = [
        {"role": "user", "content": [{"type": "video", "path": str(clip)}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": "ring"},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    inputs = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    assert inputs["input_ids"][0].tolist() == expected
    assert inputs["frame_mask"].shape == (1, 4)
    plain = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert tokenizer.decode(expected) == plain
    assert plain.startswith("<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n")


def test_frames_are_what_preparation_takes(processor, clip, picture):
    inputs = processor(videos=[clip, picture], text=[QUESTION, "What?"])
    assert inputs["frames"].dtype == torch.uint8
    video, still = (read_media(path, 56).frames.transpose(0, 3, 1, 2) for path in (clip, picture))
    assert inputs["frame_mask"].sum(1).tolist() == [4, 3]
    np.testing.assert_array_equal(inputs["frames"][0], video)
    np.testing.assert_array_equal(inputs["frames"][1, :3], np.repeat(still, 3, axis=0))
    assert not inputs["frames"][1, 3:].any()
    lengths = inputs["attention_mask"].sum(1).tolist()
    alone = processor(images=picture, text="What?")
    assert alone["input_ids"].shape[1] == lengths[1] < lengths[0]
    assert torch.equal(alone["input_ids"][0], inputs["input_ids"][1, : lengths[1]])


def test_pictures_and_arrays_in_memory_are_as_from_a_file(processor, picture):
    expected = processor(images=picture, text="What?")["frames"]
    with Image.open(picture) as opened:
        assert torch.equal(processor(images=opened, text="What?")["frames"], expected)
        pixels = np.asarray(opened)
    assert torch.equal(processor(images=pixels, text="What?")["frames"], expected)
    hours = np.repeat(np.arange(128, dtype=np.uint8), 56 * 56 * 3).reshape(128, 56, 56, 3)
    chosen = processor(videos=hours, text="What?")["frames"][0, :, 0, 0, 0]
    assert chosen.tolist() == list(range(1, 128, 2))


def test_several_stills_are_looked_at_once_each(processor, picture):
    content = [
        {"type": "image", "path": picture},
        {"type": "image", "path": picture},
        {"type": "text", "text": "Same?"},
    ]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
    assert inputs["frames"].shape[:2] == (1, 2)


def test_text_alone_is_answered(processor, model):
    inputs = processor(text="What is the opposite of up?")
    assert inputs["frames"].shape == (1, 0, 3, 56, 56)
    for mode in ("autoregressive", "coarse_fine"):
        assert model.generate(**inputs, mode=mode, max_new_tokens=3, do_sample=False).shape[0] == 1


def test_what_cannot_be_used_is_said(processor, clip, picture, tmp_path):
    with pytest.raises(ValueError, match="text: expected a question"):
        processor(videos=clip)
    with pytest.raises(ValueError, match="expected one of them"):
        processor(videos=clip, images=picture, text="?")
    with pytest.raises(ValueError, match="1 media for 2 texts"):
        processor(videos=[clip], text=["?", "?"])
    with pytest.raises(MediaError, match="missing_file"):
        processor(videos=tmp_path / "nowhere.mp4", text="?")
    with pytest.raises(ValueError, match=r"got ndarray float64 \[4, 4, 3\]"):
        processor(images=np.zeros((4, 4, 3)), text="?")
    both = [{"type": "image", "path": picture}, {"type": "video", "path": clip}]
    with pytest.raises(ValueError, match="expected one video, or any number of stills"):
        processor.apply_chat_template([{"role": "user", "content": both}], tokenize=True)
    with pytest.raises(ValueError, match="message 0: expected role"):
        processor.apply_chat_template([{"role": "robot", "content": "?"}], tokenize=True)
    with pytest.raises(ValueError, match="message 0: expected text, image or video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio", "path": "x"}]}], tokenize=True)
    with pytest.raises(ValueError, match="at least one message"):
        processor.apply_chat_template([[]], tokenize=True)
    with pytest.raises(ConfigError, match="tokens, but the model has 300"):
        processor_for(tiny_config(300), "tiny")


def test_saved_and_loaded_it_is_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = FoveatedProcessor.from_pretrained(tmp_path)
    assert (again.frame_size, again.looks, again.max_frames, again.question_first) == (56, 3, 64, False)
    chat = [{"role": "user", "content": QUESTION}]
    assert again.apply_chat_template(chat) == processor.apply_chat_template(chat)


def test_a_still_is_given_as_often_as_the_model_needs_for_its_looks(caplog):
    assert processor_for(tiny_config(1024, tokens_per_frame=4), "tiny", looks=8).looks == 2
    assert processor_for(tiny_config(1024, architecture="multi_token"), "tiny", looks=8).looks == 1
    assert not caplog.records
    assert processor_for(tiny_config(1024, tokens_per_frame=16), "tiny", looks=8).looks == 1
    assert "a still becomes 16 visual tokens, in training 8: tokens_per_frame = 16" in caplog.text
