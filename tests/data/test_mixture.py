"""Mixtures: shares in every stretch, caps in every prefix, an end that is known, and what is wrong by name."""

from __future__ import annotations

import typing
from dataclasses import fields, replace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm.config import REPOSITORY, load_config, save_config
from fvlm.data.chat import load_tokenizer
from fvlm.data.errors import SampleError
from fvlm.data.mixture import Kind, Mixture, MixtureConfig
from fvlm.data.order import SampleOrder
from fvlm.data.plan import Capacities, Plan, SampleTable
from fvlm.data.shard import KINDS, ShardWriter, load_index
from fvlm.schema import ConfigError
from fvlm.train_config import GROUPS
from tests.data.tables import COUNT_NAMES, STAGE_2, draw_table

MIXTURES = sorted((REPOSITORY / "launch" / "configs" / "mixtures").glob("*.yaml"))
COT = "chain_of_thought"
SOURCES = {name: row for name, row in STAGE_2.items() if name != "cauldron_multi"} | {
    "rlaif_v": (0.02, "image", (1, 1), 5.0, 0.5)
}


def make_table(num: int = 6000, names=tuple(SOURCES)) -> SampleTable:
    """Sources as published: every fifth row of The Cauldron has several pictures, every tenth of SmolTalk is tagged."""
    table = draw_table(num, {name: SOURCES[name] for name in names})
    position, of = np.arange(num), np.array(table.source_names)[table.source]
    kind = np.where((of == "cauldron") & (position % 5 == 0), KINDS.index("images"), table.kind).astype(np.uint8)
    tagged = ((of == "smoltalk") & (position % 10 == 0)).astype(np.uint16)
    return replace(table, kind=kind, tag_sets=((), (COT,)), tag_set=tagged)


TABLE = make_table()


def sources_of(table: SampleTable, rows: np.ndarray) -> np.ndarray:
    return np.array(table.source_names)[table.source[rows]]


def counts_before(hits: np.ndarray) -> np.ndarray:
    """How many hits each prefix of 0, 1, ... samples holds."""
    return np.concatenate([[0], np.cumsum(hits)])


def assert_share(hits: np.ndarray, share: float):
    """Within a point in every 1 000 samples, wherever they begin."""
    held = counts_before(hits)
    assert abs((held[1000:] - held[:-1000]) / 1000 - share).max() < 0.01


def expected_shares(values: dict, table: SampleTable) -> dict[tuple[str, str], float]:
    """(source, kind) → share, worked out by hand from a mixture's file."""
    cells = {}
    for number, name in enumerate(table.source_names):
        mine = table.kind[table.source == number]
        for kind in np.unique(mine):
            part = values["weights"][name] * np.mean(mine == kind)
            cells[name, KINDS[kind]] = part if values.get("kinds", {}).get(KINDS[kind], 1) else 0

    def group(kind: str) -> str:
        if "kinds" in values:
            return kind
        return kind if "text_share" in values and kind == "text" else "frames"

    stated = values.get("kinds") or {"frames": 1 - values.get("text_share", 0), "text": values.get("text_share", 0)}
    sums = {name: sum(share for (_, kind), share in cells.items() if group(kind) == name) for name in stated}
    return {
        (source, kind): share and share / sums[group(kind)] * stated[group(kind)] / sum(stated.values())
        for (source, kind), share in cells.items()
    }


# --- the mixtures that are shipped -------------------------------------------------------------------------------


def test_the_recipes_mixtures_are_there():
    assert {path.stem for path in MIXTURES} == {"stage1", "stage2", "dpo", "video_sft", "d1", "t1", "t2", "t3", "t4"}


@pytest.mark.parametrize("path", MIXTURES, ids=[path.stem for path in MIXTURES])
def test_shipped_mixtures_hold_in_every_thousand_samples(path):
    values = yaml.safe_load(path.read_text())
    table = make_table(names=tuple(values["weights"]))
    order = SampleOrder(table, Mixture(**values), seed=5)
    rows, _ = order.take(0, 20_000)
    expected = expected_shares(values, table)
    kind, source = np.array(KINDS)[table.kind[rows]], sources_of(table, rows)
    for name in table.source_names:
        assert_share(source == name, sum(share for (of, _), share in expected.items() if of == name))
    for name in KINDS if "kinds" in values else ["text"]:
        assert_share(kind == name, sum(share for (_, of), share in expected.items() if of == name))
    held = counts_before(table.tag_set[rows] == 1)
    assert (held <= values.get("tag_caps", {}).get(COT, 1) * np.arange(len(held))).all()
    assert held[-1] == 0 if "tag_caps" not in values else held[-1] >= 0.0005 * 20_000 - 3
    assert sum(order.shares().values()) == pytest.approx(1)


def test_a_tag_is_capped_where_there_are_more_and_left_where_there_are_fewer():
    capped, free = (Mixture(text_share=0.5, tag_caps={COT: cap}) for cap in (0.01, 0.9))
    for mixture, share in ((capped, 0.01), (free, 0.5 * 0.1)):
        rows, _ = SampleOrder(TABLE, mixture, 2).take(0, 30_000)
        assert abs(np.mean(TABLE.tag_set[rows] == 1) - share) < 0.005
        assert_share(TABLE.kind[rows] == KINDS.index("text"), 0.5)
    never, _ = SampleOrder(TABLE, Mixture(tag_caps={COT: 0}), 2).take(0, 10_000)
    assert not TABLE.tag_set[never].any()


# --- caps and repeats --------------------------------------------------------------------------------------------


@given(
    st.integers(0, 100),
    st.dictionaries(st.sampled_from(["cauldron", "vript", "smoltalk", "webvid"]), st.floats(0.001, 0.3), max_size=4),
    st.floats(0.0005, 0.2),
    st.sampled_from([{}, {"text_share": 0.14}, {"kinds": {"video": 33, "image": 34, "text": 20, "images": 12}}]),
)
@settings(max_examples=25, deadline=None)
def test_share_caps_hold_in_every_prefix(seed, caps, tag_cap, groups):
    if groups:  # where it is the only source of its kind there would be nobody to take its place
        caps = {name: cap for name, cap in caps.items() if name in ("vript", "webvid")}
    rows, _ = SampleOrder(TABLE, Mixture(caps=caps, tag_caps={COT: tag_cap}, **groups), seed).take(0, 5000)
    source, places = sources_of(TABLE, rows), np.arange(5001)
    assert (counts_before(TABLE.tag_set[rows] == 1) <= tag_cap * places).all()
    for name, cap in caps.items():
        assert (counts_before(source == name) <= cap * places).all()


def test_caps_that_just_suffice_are_met_within_a_sample():
    table = make_table(1000, ("openvid", "webvid"))
    rows, _ = SampleOrder(table, Mixture(caps={"openvid": 0.4, "webvid": 0.6}), 0).take(0, 3000)
    held = counts_before(sources_of(table, rows) == "openvid")
    assert (held <= 0.4 * np.arange(3001)).all()
    assert (np.arange(3001) - held <= 0.6 * np.arange(3001) + 2).all()


def test_what_a_share_cap_takes_goes_to_the_others_by_their_weight():
    weights = dict.fromkeys(SOURCES, 1.0) | {"cauldron": 10.0}
    order = SampleOrder(TABLE, Mixture(weights=weights, caps={"cauldron": 0.2}), 0)
    shares = order.shares()
    assert shares["cauldron"] == pytest.approx(0.2, abs=1e-6)
    assert all(
        shares[name] == pytest.approx(0.8 / (len(SOURCES) - 1), abs=1e-6) for name in shares if name != "cauldron"
    )
    rows, _ = order.take(0, 10_000)
    for name, share in shares.items():
        assert_share(sources_of(TABLE, rows) == name, share)


def test_numbers_of_samples_are_spread_over_the_epoch_and_then_reached():
    """`caps: {cauldron: 500}` of natural weights: 500 by the epoch's end, evenly, all others once; afterwards none."""
    order = SampleOrder(TABLE, Mixture(caps={"cauldron": 500}), 3)
    size = len(TABLE) - int((sources_of(TABLE, np.arange(len(TABLE))) == "cauldron").sum()) + 500
    rows, _ = order.take(0, 3 * size)
    is_capped = sources_of(TABLE, rows) == "cauldron"
    assert_share(is_capped[:size], 500 / size)
    assert is_capped[:size].sum() == is_capped.sum() == 500
    assert len(np.unique(rows[:size])) == size
    position, note = order.notes(3 * size)[0].split(" samples: ")
    assert abs(int(position.removeprefix("after ").replace(",", "")) - size) <= 2
    assert "caps.cauldron" in note


def test_repeats_bound_how_often_a_sample_is_shown_and_the_rest_takes_over():
    order = SampleOrder(TABLE, Mixture(weights=dict.fromkeys(SOURCES, 1.0), repeats={"webvid": 2, "vript": 1}), 1)
    rows, _ = order.take(0, 30_000)
    source, shown = sources_of(TABLE, rows), np.bincount(rows, minlength=len(TABLE))
    of = sources_of(TABLE, np.arange(len(TABLE)))
    assert set(shown[of == "webvid"]) == {2}
    assert set(shown[of == "vript"]) == {1}
    assert order.size is None
    late = source[-5000:]
    for name in set(SOURCES) - {"webvid", "vript"}:
        assert_share(late == name, 1 / (len(SOURCES) - 2))


def test_natural_weights_with_repeats_show_every_sample_so_often_and_then_end():
    for repeats in (1, 3):
        order = SampleOrder(TABLE, Mixture(repeats=dict.fromkeys(SOURCES, repeats)), 4)
        assert order.size == repeats * len(TABLE)
        for epoch in range(repeats):
            rows, _ = order.take(epoch * len(TABLE), (epoch + 1) * len(TABLE))
            assert len(np.unique(rows)) == len(TABLE)
        with pytest.raises(ValueError, match="ends at"):
            order.take(0, order.size + 1)


@pytest.mark.parametrize("mixture", [{}, {"kinds": {"video": 3, "image": 3, "text": 2, "images": 1}}])
def test_an_epoch_shows_every_sample_once(mixture):
    """With natural weights; with shares of kinds, every sample of a source once before one comes again."""
    rows, _ = SampleOrder(TABLE, Mixture(**mixture), 9).take(0, 2 * len(TABLE))
    if not mixture:
        assert set(np.bincount(rows)) == {2}
    for source, kind in {*zip(TABLE.source.tolist(), TABLE.kind.tolist(), strict=True)}:
        mine = rows[(TABLE.source[rows] == source) & (TABLE.kind[rows] == kind)]
        size = int(((TABLE.source == source) & (TABLE.kind == kind)).sum())
        assert all(len(np.unique(mine[i : i + size])) == len(mine[i : i + size]) for i in range(0, len(mine), size))


def test_a_stated_share_that_runs_out_ends_the_mixture_and_a_longer_plan_is_refused():
    mixture = Mixture(text_share=0.14, caps={"smoltalk": 140})
    order = SampleOrder(TABLE, mixture, 0)
    rows, _ = order.take(0, order.size)
    assert (TABLE.kind[rows] == KINDS.index("text")).sum() == 140
    assert abs(order.size - 1000) <= 8
    capacities = Capacities.propose(TABLE, mixture, tokens=8192, objective="ce_all")
    assert Plan(TABLE, mixture, capacities, "ce_all", 0, order.size, 256).num_windows == -(-order.size // 256)
    with pytest.raises(ValueError, match=r"ends after 1,0\d\d of 5,000 samples: caps.smoltalk.*share of text.*lower"):
        Plan(TABLE, mixture, capacities, "ce_all", 0, 5000, 256)


MIXED = {
    "kinds": {"kinds": {"video": 33, "image": 34, "text": 20, "images": 12}, "tag_caps": {COT: 0.01}},
    "limits": {"caps": {"cauldron": 700, "vript": 0.05}, "repeats": {"webvid": 1, "openvid": 2, "vista": 1}},
    "all": {"text_share": 0.1, "caps": {"vista": 300}, "tag_caps": {COT: 0.002}, "repeats": {"webvid": 1}},
}


@pytest.mark.parametrize("name", MIXED)
@given(st.integers(0, 9000), st.integers(1, 3000), st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_any_stretch_is_found_without_the_rest(name, start, length, seed):
    mixture = Mixture(question_first=0.5, narrated=0.3, **MIXED[name])
    whole, part = (SampleOrder(TABLE, mixture, seed).take(*span) for span in ((0, 12_000), (start, start + length)))
    for all_values, values in zip(whole, part, strict=True):
        np.testing.assert_array_equal(all_values[start : start + length], values)


def test_order_is_the_promised_one():
    """Runs resume by position: a change of the order, by us or by a library, must be noticed."""
    n = np.arange(300, dtype=np.int32)
    counts = dict.fromkeys((*COUNT_NAMES, "num_frames"), n)
    source, kind = (n // 100).astype(np.int16), (n // 60 % 4).astype(np.uint8)
    tags = {"tag_sets": ((), (COT,)), "tag_set": (n % 7 == 0).astype(np.uint16)}
    table = SampleTable(
        source_names=("a", "b", "c"), shard=n // 10, row=n % 10, source=source, kind=kind, **counts, **tags
    )
    mixture = Mixture(kinds=dict.fromkeys(KINDS, 1), caps={"a": 0.25}, repeats={"c": 2}, tag_caps={COT: 0.05})
    rows, _ = SampleOrder(table, mixture, seed=42).take(600, 616)
    assert rows.tolist() == GOLDEN_ROWS


GOLDEN_ROWS = [181, 240, 137, 104, 195, 40, 146, 60, 184, 249, 144, 109, 192, 255, 155, 83]


# --- what the data lack ------------------------------------------------------------------------------------------

WRONG = [
    ({"weights": {"openvid": 1, "laion": 1}}, ["mixture.weights", "cauldron", "name exactly the sources present"]),
    ({"weights": dict.fromkeys([*SOURCES, "laion"], 1)}, ["mixture.weights", "laion", "missing: skip"]),
    ({"caps": {"laion": 5}}, ["mixture.caps", "laion", "missing: skip"]),
    ({"repeats": {"laion": 5}}, ["mixture.repeats", "laion"]),
    ({"kinds": {"video": 1}}, ["mixture.kinds", "image, images, text", "name exactly the kinds present"]),
    ({"caps": dict.fromkeys(SOURCES, 0.1)}, ["mixture.caps.cauldron", "10.00%", "left to nobody", "raise a cap"]),
    ({"text_share": 0.14, "caps": {"smoltalk": 0.1}}, ["mixture.caps.smoltalk", "4.00%", "(text)"]),
    ({"weights": {"openvid": -1}}, ["weights.openvid = -1", "at least 0"]),
    ({"kinds": {"video": 0}}, ["kinds", "one above 0"]),
    ({"kinds": {"video": 1}, "text_share": 0.1}, ["text_share = 0.1", "kinds.text"]),
    ({"caps": {"openvid": 0}}, ["caps.openvid = 0", "share between 0 and 1, or a whole number"]),
    ({"caps": {"openvid": 1.5}}, ["caps.openvid = 1.5"]),
    ({"repeats": {"openvid": 0}}, ["repeats.openvid = 0", "at least 1"]),
    ({"tag_caps": {COT: 5}}, [f"tag_caps.{COT} = 5", "between 0 and 1"]),
    ({"missing": "ignore"}, ["missing = 'ignore'", "error or skip"]),
]


@pytest.mark.parametrize(("values", "expected"), WRONG, ids=[" ".join(map(str, row[1][:2])) for row in WRONG])
def test_what_is_wrong_is_named(values, expected):
    with pytest.raises(ValueError) as caught:
        SampleOrder(TABLE, Mixture(**values), 0)
    for part in expected:
        assert part in str(caught.value)


def test_missing_sources_and_kinds_can_be_skipped():
    table = make_table(2000, ("openvid", "webvid"))
    values = yaml.safe_load((REPOSITORY / "launch" / "configs" / "mixtures" / "video_sft.yaml").read_text())
    with pytest.raises(ValueError, match="missing: skip"):
        SampleOrder(table, Mixture(**values), 0)
    order = SampleOrder(table, Mixture(**values, missing="skip"), 0)
    assert order.shares() == pytest.approx({"openvid": 905 / 924, "webvid": 19 / 924}, abs=1e-6)
    notes = " ".join(order.notes(1000))
    assert all(word in notes for word in ("weights", "smoltalk", "kinds", "images", COT))
    text = Mixture(text_share=0.14, missing="skip")
    assert SampleOrder(table, text, 0).notes(10) == [
        "text_share = 0.14: no source with a weight holds text-only samples; taken as 0"
    ]
    with pytest.raises(ValueError, match="one above 0"):
        SampleOrder(table, Mixture(weights={"openvid": 0, "webvid": 0, "laion": 1}, missing="skip"), 0)


def test_a_source_that_is_left_out_need_not_be_there():
    weights = dict.fromkeys(SOURCES, 1.0) | {"laion": 0}
    assert SampleOrder(TABLE, Mixture(weights=weights, caps={"laion": 5}), 0).notes(10) == []


# --- from rows to the table, from YAML to the mixture ------------------------------------------------------------


def test_tags_come_from_rows_through_index_and_table(tmp_path):
    tokenizer = load_tokenizer("tiny")
    rows = [None, [COT, "numina"], ["numina"], ["chat", COT], []]
    with ShardWriter(tmp_path, tokenizer, samples_per_shard=3) as writer:
        meta = {"kind": "text", "frame_count": 0, "user": "a", "assistant": "b", "source": "s"}
        for wrong in ("numina", [3]):
            with pytest.raises(SampleError, match="expected a list of strings"):
                writer.write(meta | {"key": "wrong", "tags": wrong}, [])
        for number, tags in enumerate(rows):
            writer.write(meta | {"key": str(number)} | ({} if tags is None else {"tags": tags}), [])
    indexes = [load_index(path, tokenizer) for path in sorted(tmp_path.glob("*.tar"))]
    table = SampleTable.from_indexes(indexes, tags={COT})
    assert [table.tag_sets[number] for number in table.tag_set] == [(), (COT,), (), (COT,), ()]
    rows, _ = SampleOrder(table, Mixture(tag_caps={COT: 0.1}), 0).take(0, 100)
    assert 8 <= (table.tag_set[rows] > 0).sum() <= 10
    with pytest.raises(ValueError, match=f"tag_caps.*{COT}"):
        SampleOrder(SampleTable.from_indexes(indexes), Mixture(tag_caps={COT: 0.1}), 0)


def run_config(tmp_path, mixture, *overrides) -> MixtureConfig:
    rates = {group: {"base": 1e-3} for group in GROUPS}
    train = {"total_samples": 100, "packs_per_step": 2, "learning_rate": rates}
    values = {"name": "run", "data": {"train": ["shards"], "mixture": mixture}, "train": train}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    config = load_config(str(tmp_path / "run.yaml"), overrides)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(str(tmp_path / "saved.yaml")) == config
    return config.data.mixture


def test_a_run_names_a_mixture_and_changes_it(tmp_path):
    stage1 = run_config(tmp_path, "stage1")
    assert (stage1.text_share, stage1.weights["openvid"], stage1.looks) == (0.14, 905_000, 8)
    (tmp_path / "mine.yaml").write_text("looks: 2\nweights: {a: 1}\n")
    assert run_config(tmp_path, str(tmp_path / "mine.yaml")) == MixtureConfig(looks=2, weights={"a": 1.0})
    changed = replace(stage1, looks=4, weights={"openvid": 1.0, "smoltalk": 280_000.0, "mine": 7.0})
    inline = {"base": "stage1", "looks": 4, "weights": {"openvid": 1, "webvid": None, "mine": 7}}
    assert run_config(tmp_path, inline) == changed
    overrides = ["looks=4", "weights.openvid=1", "weights.webvid=null", "weights.mine=7"]
    assert run_config(tmp_path, "stage1", *(f"data.mixture.{each}" for each in overrides)) == changed
    assert run_config(tmp_path, {"looks": 3}, "data.mixture=stage1") == stage1
    assert run_config(tmp_path, "stage1", "data.mixture.text_share=null") == replace(stage1, text_share=None)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("stage9", r"data.mixture.base: 'stage9'.*stage1.*video_sft"),
        ({"base": 3}, r"data.mixture.base = 3: expected the name"),
        ({"base": "stage1", "look": 3}, r"unknown key data.mixture.look \(did you mean looks"),
        ({"kinds": {"movie": 3}}, r"data.mixture.kinds key = 'movie': expected one of video, image"),
        ({"grid": 4}, r"unknown key data.mixture.grid"),
        ({"caps": {"webvid": 0}}, r"data.mixture.caps.webvid = 0.0: expected a share"),
        ({"repeats": {"webvid": 0.5}}, r"data.mixture.repeats.webvid = 0.5: expected a whole number"),
    ],
)
def test_wrong_mixtures_of_a_run_are_named(tmp_path, mixture, message):
    with pytest.raises(ConfigError, match=message):
        run_config(tmp_path, mixture)


def test_kinds_are_those_of_the_shards_and_every_field_is_documented():
    import ast
    import inspect

    import fvlm.data.mixture

    assert typing.get_args(Kind) == KINDS
    body = next(node for node in ast.parse(inspect.getsource(fvlm.data.mixture)).body if isinstance(node, ast.ClassDef))
    documented = [
        node.target.id
        for node, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    ]
    assert documented == [field.name for field in fields(MixtureConfig)]
