"""Attention maps: the ones of the model, in the order of the sample, kept and summed up without loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fvlm.data.chat import Visual
from fvlm.evaluate.attention import choose_clips, clip_maps, look_at_array, save_maps
from fvlm.evaluate.items import Presentation
from fvlm.evaluate.maps import ClipMaps, cell_shares, cued_share, load_clip, patch_heat
from fvlm.model.configuration import MODES

STILL = {"kind": "image", "frame_count": 1, "look_at": None}


def test_maps_of_a_clip(model, tokenizer, presentation, make_item):
    places = [None, [0, 3], [2, 1], None]
    item = make_item(1, user="Where?", assistant="ring", look_at=places)
    clip = clip_maps(model, item, tokenizer, presentation, "cpu", MODES)
    assert clip.visual_frame.tolist() == [0, 1, 2, 3]
    assert clip.look_at.tolist() == [[-1, -1], [0, 3], [2, 1], [-1, -1]]
    for mode in MODES:
        maps = clip.maps[mode].astype(np.float64)
        assert maps.shape == (4, 4, 3, 17)
        np.testing.assert_allclose(maps.sum(-1), 1, atol=2e-3)
    # One fixed query: what it sees in a frame does not depend on the clip around it.
    still = replace(item, num_frames=1, read_frames=item.read_frames()[2:3].copy, meta=item.meta | STILL)
    alone = clip_maps(model, still, tokenizer, presentation, "cpu", ["coarse_only"])
    assert alone.visual_frame.tolist() == [0, 0, 0]
    np.testing.assert_allclose(alone.maps["coarse_only"][1], clip.maps["coarse_only"][2], atol=1e-3)


class Backwards(Presentation):
    """Shows a clip from its end, so that the order of the sample is not that of the pack, which sorts by frame."""

    def segments(self, meta, tokenizer):
        visual, *text = super().segments(meta, tokenizer)
        return [Visual(visual.frames[::-1]), *text]


def test_looks_stand_in_the_order_of_the_sample(model, tokenizer, make_item):
    item = make_item(2, user="Where?", assistant="ring")
    clip = clip_maps(model, item, tokenizer, Backwards(image_size=56), "cpu", MODES)
    assert clip.visual_frame.tolist() == [3, 2, 1, 0]
    turned = replace(item, read_frames=item.read_frames()[::-1].copy)
    same = clip_maps(model, turned, tokenizer, Presentation(image_size=56), "cpu", MODES)
    for mode in MODES:
        np.testing.assert_allclose(clip.maps[mode], same.maps[mode], atol=1e-3)
    # The first look's query is written before anything was seen.
    np.testing.assert_allclose(clip.maps["coarse_fine"][0], clip.maps["autoregressive"][0], atol=1e-3)
    assert not np.allclose(clip.maps["coarse_fine"][1], clip.maps["coarse_fine"][0], atol=1e-3)


def test_files_hold_the_arrays_and_nothing_to_unpickle(model, tokenizer, presentation, make_item, tmp_path):
    item = make_item(3, user="Where?", assistant="ring", look_at=[[0, 0]] * 4)
    clip = clip_maps(model, item, tokenizer, presentation, "cpu", ["coarse_fine"])
    (path,) = save_maps([clip], tmp_path / "maps")
    found = load_clip(path)
    assert (found.key, found.source, found.user, found.assistant) == ("item-3", "test/a", "Where?", "ring")
    for name in ("frames", "visual_frame", "look_at"):
        np.testing.assert_array_equal(getattr(found, name), getattr(clip, name))
    np.testing.assert_array_equal(found.maps["coarse_fine"], clip.maps["coarse_fine"])
    assert found.maps["coarse_fine"].dtype == np.float16
    assert [p.name for p in (tmp_path / "maps").iterdir()] == ["clip-00.npz"]


def test_a_file_that_is_no_clip_is_named(tmp_path):
    np.savez(tmp_path / "other.npz", frames=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz: missing array\(s\) visual_frame, look_at, text"):
        load_clip(tmp_path / "other.npz")


def clip_with(maps: np.ndarray, look_at: list) -> ClipMaps:
    frames = np.zeros((len(look_at), 3, 56, 56), np.uint8)
    return ClipMaps(
        key="k",
        source="s",
        user="u",
        assistant="a",
        frames=frames,
        visual_frame=np.arange(len(look_at)),
        look_at=np.array(look_at),
        maps={"coarse_fine": maps},
    )


def test_shares_by_cell_equal_a_loop_over_pixels():
    """A 6 x 6 patch grid under 4 x 4 cells: patches lie over two cells; 12 x 12 pixels divide both."""
    heat = np.random.default_rng(0).random((2, 36))
    heat /= heat.sum(1, keepdims=True)
    pixels = np.repeat(np.repeat(heat.reshape(2, 6, 6), 2, 1), 2, 2) / 4
    expected = pixels.reshape(2, 4, 3, 4, 3).sum((2, 4))
    np.testing.assert_allclose(cell_shares(heat), expected, atol=1e-12)
    np.testing.assert_allclose(cell_shares(heat).sum((1, 2)), 1)


def test_heat_is_of_all_layers_without_cls():
    maps = np.zeros((1, 4, 2, 17))
    maps[:, :1, :, 1] = 1.0  # the first layer looks at patch 0
    maps[:, 1:, :, 0] = 0.6  # the others at CLS most of all
    maps[:, 1:, :, 7] = 0.4
    heat = patch_heat(maps)
    assert heat.shape == (1, 16)
    assert heat[0].tolist() == pytest.approx([{0: 1 / 2.2, 6: 1.2 / 2.2}.get(i, 0.0) for i in range(16)])


def test_cued_share_counts_later_looks_with_a_place():
    maps = np.full((4, 2, 1, 17), 1 / 17)
    maps[2, ..., 1:] = 0
    maps[2, ..., 1 + 5] = 1  # look 2 sees cell (1, 1) alone
    clip = clip_with(maps, [[0, 0], [3, 3], [1, 1], [-1, -1]])
    share = cued_share([clip, clip], "coarse_fine")
    assert share == {"share": pytest.approx((1 / 16 + 1) / 2), "top1": 0.5, "n": 4, "chance": 1 / 16}
    assert cued_share([clip], "autoregressive") is None
    assert cued_share([clip_with(maps, [[-1, -1]] * 4)], "coarse_fine") is None


def test_clips_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match=r"look_at has shape \(3, 2\), expected \(2, 2\)"):
        ClipMaps(
            key="k",
            source="s",
            user="u",
            assistant="a",
            frames=np.zeros((2, 3, 4, 4), np.uint8),
            visual_frame=np.arange(2),
            look_at=np.zeros((3, 2), int),
        )
    with pytest.raises(ValueError, match="15 patch keys are no square grid"):
        clip_with(np.zeros((2, 1, 1, 16)), [[0, 0], [1, 1]])
    with pytest.raises(ValueError, match=r"expected \[2, L, h, N\+1\]"):
        clip_with(np.zeros((3, 1, 1, 17)), [[0, 0], [1, 1]])


def test_choice_of_clips_is_fixed_and_spread_over_sources(make_item):
    places = [[0, 0]] * 4
    items = [make_item(i, source="plain", user="u", assistant="a") for i in range(4)]
    items += [make_item(10 + i, source="cue", user="u", assistant="a", look_at=places) for i in range(4)]
    items += [make_item(20 + i, source="relay", user="u", assistant="a", look_at=places) for i in range(4)]
    items.append(make_item(30, "text", 0, source="text", user="u", assistant="a"))
    chosen = choose_clips(items, 5)
    assert [item.meta["key"] for item in chosen] == ["item-10", "item-20", "item-0", "item-11", "item-21"]
    assert chosen == choose_clips(items, 5)
    assert len(choose_clips(items, 50)) == 12


def test_no_places_give_minus_one(make_item):
    assert look_at_array(make_item(1)).tolist() == [[-1, -1]] * 4


@pytest.mark.parametrize(
    "places", [[[0, 4]] * 4, [[0, -1]] * 4, [[1, 1]] * 3, [[1]] * 4, ["ab"] * 4, [[1.5, 0]] * 4, 7]
)
def test_places_that_are_no_cells_are_left_out(make_item, caplog, places):
    assert look_at_array(make_item(1, look_at=places)).tolist() == [[-1, -1]] * 4
    assert "item-1: look_at" in caplog.text
    assert "expected 4 entries, each null or [row, column] of 0 to 3" in caplog.text


def test_a_kept_file_with_places_outside_the_grid_is_read(tmp_path):
    maps = np.full((2, 2, 1, 17), 1 / 17)
    (path,) = save_maps([clip_with(maps, [[3, 3], [9, 0]])], tmp_path)
    clip = load_clip(path)
    assert clip.look_at.tolist() == [[3, 3], [-1, -1]]
    assert cued_share([clip], "coarse_fine") is None


def test_model_is_left_as_it_was(model, tokenizer, presentation, make_item):
    model.train()
    clip_maps(model, make_item(1, user="u", assistant="a"), tokenizer, presentation, "cpu", ["coarse_fine"])
    assert model.training
    assert torch.is_grad_enabled()
    model.eval()
