"""The validation set: fixed by content, in the sources' shares, and left out of training."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.validation import RECORD, ValidationError, draw, main, quotas
from data_prep.verify import main as verify
from fvlm.config import load_config
from fvlm.data.chat import load_tokenizer
from fvlm.data.content import occurs, salted
from fvlm.data.shard import ShardReader, ShardWriter, find_shards, load_index
from fvlm.data.video import encode_jpeg
from fvlm.schema import ConfigError
from fvlm.train.build import load_data

TINY = load_tokenizer("tiny")
SIZE = 56
SOURCES = {"films": 60, "stills": 30, "words": 19, "rare": 1}


def make_samples(seed: int = 0) -> list[tuple[dict, list[bytes]]]:
    """110 samples of four sources; `films` has one sample three times, one copy under another source."""
    random = np.random.default_rng(seed)
    made = []
    for source, count in SOURCES.items():
        for number in range(count):
            frames = {"films": 2, "stills": 1, "words": 0, "rare": 1}[source]
            kind = {"films": "video", "words": "text"}.get(source, "image")
            meta = {"key": f"{source}-{number:03d}", "source": source, "kind": kind, "frame_count": frames}
            meta |= {"user": "What is it?", "assistant": f"{source} {number}", "tags": [source]}
            made.append(
                (meta, [encode_jpeg(random.integers(0, 255, (SIZE, SIZE, 3), np.uint8)) for _ in range(frames)])
            )
    for key, source in (("a-copy", "films"), ("b-copy", "stills")):
        made.append((made[7][0] | {"key": key, "source": source}, made[7][1]))
    return made


def write(folder: Path, made, per_shard: int = 16) -> list[Path]:
    with ShardWriter(folder, TINY, per_shard) as writer:
        for meta, jpegs in made:
            writer.write(meta, jpegs)
    return find_shards(folder)


def read(folder: Path) -> dict[str, tuple[dict, list[bytes]]]:
    found = {}
    for path in find_shards(folder):
        index = load_index(path, TINY)
        reader = ShardReader(path, index)
        found |= {str(key): reader.read(row) for row, key in enumerate(index.keys)}
    return found


def contents(folder: Path) -> list[int]:
    return [content for path in find_shards(folder) for content in load_index(path, TINY).content.tolist()]


def file_digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made():
    return make_samples()


@pytest.fixture
def shards(tmp_path, made):
    return write(tmp_path / "train", made)


def test_shares_by_largest_remainder_and_one_at_least():
    assert quotas(np.array([60, 30, 10]), 10).tolist() == [6, 3, 1]
    assert quotas(np.array([59, 31, 10]), 10).tolist() == [6, 3, 1]
    assert quotas(np.array([1000, 1, 0, 1]), 10).tolist() == [8, 1, 0, 1]
    assert quotas(np.array([5, 5, 5]), 4).tolist() == [2, 1, 1]
    random = np.random.default_rng(0)
    for _ in range(300):
        available = (10 ** random.uniform(0, 6, random.integers(1, 30))).astype(np.int64)
        if available.sum() <= len(available):
            continue
        samples = int(random.integers(len(available), available.sum()))
        given = quotas(available, samples)
        assert given.sum() == samples
        assert (given >= 1).all()
        assert (given <= available).all()
        exact = samples * available / available.sum()
        assert (given[exact < 1] == 1).all()
        assert (given <= np.maximum(np.ceil(exact), 1)).all()
    for samples in (2, 100):
        with pytest.raises(ValidationError, match=f"--samples {samples}: expected at least one a source"):
            quotas(np.array([60, 30, 10]), samples)


def test_the_set_is_drawn_by_share_without_duplicates(tmp_path, shards, made):
    record = draw(shards, tmp_path / "val", samples=22, seed=0, tokenizer=TINY)
    before, found = {meta["key"]: (meta, jpegs) for meta, jpegs in made}, read(tmp_path / "val")
    assert all(found[key] == before[key] for key in found)
    assert Counter(meta["source"] for meta, _ in found.values()) == {"films": 11, "stills": 6, "words": 4, "rare": 1}
    assert len(set(contents(tmp_path / "val"))) == len(found) == 22
    assert record == json.loads((tmp_path / "val" / RECORD).read_text())
    assert record["drawn_from"]["samples"] == 112
    assert record["drawn_from"]["distinct"] == 110
    assert {name: (each["available"], each["drawn"]) for name, each in record["by_source"].items()} == {
        "films": (60, 11), "rare": (1, 1), "stills": (30, 6), "words": (19, 4)}  # fmt: skip
    assert not record["passed_over"]


def test_neither_order_nor_number_of_shards_matters(tmp_path, shards, made):
    draw(shards, tmp_path / "val", samples=40, seed=3, tokenizer=TINY)
    shuffled = [made[i] for i in np.random.default_rng(1).permutation(len(made))]
    for number, per_shard in enumerate((7, 1000)):
        other = write(tmp_path / f"train-{number}", shuffled, per_shard)
        draw(other[::-1], tmp_path / f"val-{number}", samples=40, seed=3, tokenizer=TINY)
        assert file_digests(tmp_path / f"val-{number}") == file_digests(tmp_path / "val")
    draw(shards, tmp_path / "another", samples=40, seed=4, tokenizer=TINY)
    both = set(contents(tmp_path / "val")) & set(contents(tmp_path / "another"))
    assert 1 <= len(both) < 30  # `rare` is in both; of the others 40 * 40 / 110 by chance


def test_of_two_sets_with_a_seed_the_smaller_is_in_the_larger(tmp_path, shards):
    """More of the same: growing a set does not throw measured samples away."""
    draw(shards, tmp_path / "small", samples=20, seed=0, tokenizer=TINY)
    draw(shards, tmp_path / "large", samples=60, seed=0, tokenizer=TINY)
    assert set(contents(tmp_path / "small")) < set(contents(tmp_path / "large"))


def test_unreadable_samples_are_passed_over(tmp_path, shards, caplog):
    first = draw(shards, tmp_path / "before", samples=40, seed=0, tokenizer=TINY)
    spoilt = sorted(key for key in read(tmp_path / "before") if key.startswith(("films", "stills")))[::9]
    for path in shards:
        index = load_index(path, TINY)
        for row, key in enumerate(index.keys.tolist()):
            if key in spoilt:
                content = bytearray(path.read_bytes())
                content[int(index.frame_offset[index.first_frame[row]]) + 200] ^= 255
                path.write_bytes(content)
    record = draw(shards, tmp_path / "after", samples=40, seed=0, tokenizer=TINY, cache_dir=tmp_path / "cache")
    assert record["by_source"] == first["by_source"]
    assert not set(read(tmp_path / "after")) & set(spoilt)
    for each in record["passed_over"]:
        assert each["key"] in spoilt
        assert each["reason"] in ("changed_bytes", "bad_jpeg")
        assert f"passed over {each['shard']}, {each['key']}" in caplog.text


def test_it_appears_complete_or_not_at_all(tmp_path, shards, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.validation.write_json", fail)
        with pytest.raises(OSError, match="No space left"):
            draw(shards, tmp_path / "val", samples=20, seed=0, tokenizer=TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train"]
    killed = tmp_path / ".val.validation.tmp"
    killed.mkdir()
    (killed / "shard-000000.tar").write_bytes(b"half")
    draw(shards, tmp_path / "val", samples=20, seed=0, tokenizer=TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "val"]


def test_a_set_stays_as_it_was_drawn(tmp_path, shards, capsys):
    arguments = ["--shards", str(tmp_path / "train"), "--out", str(tmp_path / "val"), "--samples"]
    assert main([*arguments, "20"]) == 0
    before = file_digests(tmp_path / "val")
    assert main([*arguments, "20"]) == 0
    assert capsys.readouterr().out.count("20 of 110 distinct samples") == 2
    assert main([*arguments, "21"]) == 1
    assert "holds something else than this set" in capsys.readouterr().err
    assert file_digests(tmp_path / "val") == before
    assert main(["--shards", str(tmp_path / "nothing"), "--out", str(tmp_path / "x")]) == 1
    assert "no shard in" in capsys.readouterr().err


def test_keys_that_two_shards_share(tmp_path, made):
    """Data sets number their rows alike; in one set every key has to be different."""
    renamed = [(meta | {"key": f"k{i // 2:03d}"}, jpegs) for i, (meta, jpegs) in enumerate(made[:110])]
    shards = [*write(tmp_path / "a", renamed[::2]), *write(tmp_path / "b", renamed[1::2])]
    draw(shards, tmp_path / "val", samples=100, seed=0, tokenizer=TINY)
    found = read(tmp_path / "val")
    assert len(found) == 100
    assert len({(tuple(jpegs), meta["assistant"]) for meta, jpegs in found.values()}) == 100


def config(train: Path, val: Path | None):
    names = [f"data.train=[{train}]", f"data.val=[{val or ''}]", "model.preset=tiny"]
    return load_config("tiny_test", names)


def test_training_leaves_the_set_out_by_content(tmp_path, shards, caplog):
    caplog.set_level(logging.INFO)
    everything = load_data(config(tmp_path / "train", None))
    assert "held out" not in caplog.text
    draw(shards, tmp_path / "val", samples=22, seed=0, tokenizer=TINY)
    for path in (tmp_path / "val").glob("shard*.tar"):  # under other names, it is the same set
        path.with_suffix(".idx").rename(tmp_path / "val" / "renamed.idx")
        path.rename(tmp_path / "val" / "renamed.tar")
    data = load_data(config(tmp_path / "train", tmp_path / "val"))
    kept = np.concatenate(
        [data.indexes[shard].content[[row]] for shard, row in zip(data.table.shard, data.table.row, strict=True)]
    )
    held_out = np.array(sorted(contents(tmp_path / "val")), np.uint64)
    assert not occurs(kept, held_out).any()
    assert len(kept) == sum(1 for content in contents(tmp_path / "train") if content not in set(held_out.tolist()))
    assert data.plan.fingerprint() != everything.plan.fingerprint()
    [message] = [message for message in caplog.messages if "held out" in message]
    num_dropped = 112 - len(kept)
    by_source = "films 11, stills 6, words 4, rare 1"
    assert message == f"held out {num_dropped} samples are in data.val by content and not trained on: {by_source}"
    rows = [data.plan.window_order(window)[0] for window in range(data.plan.num_windows)]
    assert np.concatenate(rows).max() < len(kept)


def test_a_copy_under_another_source_is_left_out_too(tmp_path, shards, made):
    write(tmp_path / "val", [made[7]])
    looked_at: list[None] = []
    data = load_data(config(tmp_path / "train", tmp_path / "val"), lambda: looked_at.append(None))
    assert len(looked_at) == len(data.shards) + 1
    assert len(data.table) == 112 - 3
    before, after = (Counter(data.table.source_names[i] for i in table.source.tolist()) for table in (
        load_data(config(tmp_path / "train", None)).table, data.table))  # fmt: skip
    assert before - after == Counter(films=2, stills=1)


def test_training_on_the_validation_set_alone_is_refused(tmp_path, shards):
    with pytest.raises(ConfigError, match=r"data\.train = .*without a single sample that data\.val does not hold"):
        load_data(config(tmp_path / "train", tmp_path / "train"))


def test_the_drawn_set_is_clean_though_it_lies_in_the_training_shards(tmp_path, made, capsys):
    write(tmp_path / "train", made[:110])
    assert main(["--shards", str(tmp_path / "train"), "--out", str(tmp_path / "val"), "--samples", "20"]) == 0
    asked = ["--shards", str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--workers", "1"]
    assert verify(asked) == 0
    assert (
        "20 of 20 validation samples are in the training shards, which they were drawn from" in capsys.readouterr().out
    )
    record = json.loads((tmp_path / "val" / RECORD).read_text())
    (tmp_path / "val" / RECORD).write_text(json.dumps(record | {"digest": "another"}))
    assert verify(asked) == 1
    printed = capsys.readouterr().out
    assert "changed_validation_set" in printed
    assert printed.count("validation_in_training: ") == 20
    (tmp_path / "val" / RECORD).write_text("[]")
    assert verify(asked) == 1
    assert "bad_record" in capsys.readouterr().out


def test_exclusion_at_size():
    """4.3 million contents against a thousand, and the draw's order over as many."""
    random = np.random.default_rng(0)
    contents = random.integers(0, 2**64, 4_300_000, np.uint64)
    among = np.sort(contents[::4300])
    assert occurs(contents, among).sum() == len(among)
    order = np.argsort(salted(contents, "validation", 0))[:100_000]
    assert abs(order.mean() / len(contents) - 0.5) < 0.01  # nothing but chance decides
    assert not occurs(contents, np.zeros(0, np.uint64)).any()
