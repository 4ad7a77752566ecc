"""Figures come out of records, and a record that lacks a column is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fvlm.research import plots, style
from fvlm.research.strips import plot_strip
from fvlm.research.tables import read_csv, read_jsonl
from tests.research.made_up import figures, make_clip

HEADER = "step,samples_seen,train_loss,val_loss,loss_ratio,attention_entropy,accuracy,low,high,chance"


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.csv"
    rows = [
        f"{s},{s * 32},{9 / s},{10 / s},{1 - s / 50},{2.8 - s / 20},{s / 20},{s / 25},{s / 18},0.125"
        for s in range(1, 9)
    ]
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


def assert_drawn(paths: tuple[Path, Path]) -> None:
    png, svg = paths
    with Image.open(png) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10, "an empty canvas"
    assert svg.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize("name", ["plot_losses", "plot_loss_ratio", "plot_entropy", "plot_arms"])
def test_curves_are_drawn(record, tmp_path, name):
    table = read_csv(record)
    assert_drawn(getattr(plots, name)({"a": table, "b": table}, tmp_path / "figures" / name))


def test_preference_is_drawn_side_by_side(record, tmp_path):
    text = record.read_text().replace("accuracy,low", "preference/accuracy,preference/margin")
    record.write_text(text)
    paths = plots.plot_preference({"a": read_csv(record)}, tmp_path / "figures" / "preference")
    assert_drawn(paths)
    record.write_text(text.replace("preference/margin", "other"))
    with pytest.raises(ValueError, match=r"missing column.*preference/margin"):
        plots.plot_preference({"a": read_csv(record)}, tmp_path / "figures" / "preference")


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("plot_losses", "val_loss"),
        ("plot_loss_ratio", "loss_ratio"),
        ("plot_entropy", "attention_entropy"),
        ("plot_arms", "high"),
    ],
)
def test_a_missing_column_is_refused_by_name(record, tmp_path, name, column):
    lines = [line.split(",") for line in record.read_text().splitlines()]
    place = lines[0].index(column)
    record.write_text("\n".join(",".join(c for i, c in enumerate(line) if i != place) for line in lines) + "\n")
    with pytest.raises(ValueError, match=rf"metrics\.csv: missing column\(s\) {column}; it has step"):
        getattr(plots, name)({"a": read_csv(record)}, tmp_path / name)


def test_equal_records_give_equal_vector_figures(record, tmp_path):
    first = plots.plot_losses({"a": read_csv(record)}, tmp_path / "one")[1].read_bytes()
    assert first == plots.plot_losses({"a": read_csv(record)}, tmp_path / "two")[1].read_bytes()


def test_mode_bars(tmp_path):
    group = {"coarse_only": figures(0.0), "coarse_fine": figures(1.0), "autoregressive": figures(0.5)}
    assert_drawn(plots.plot_modes({"cue": group, "caption": {"coarse_fine": figures(0.3)}}, tmp_path / "modes"))


def test_mode_bars_refuse_an_accuracy_without_interval_or_chance(tmp_path):
    group = {"coarse_fine": {"accuracy": 0.5, "low": 0.4}}
    with pytest.raises(ValueError, match="'cue', 'coarse_fine': missing high, chance"):
        plots.plot_modes({"cue": group}, tmp_path / "modes")
    with pytest.raises(ValueError, match="no groups"):
        plots.plot_modes({}, tmp_path / "modes")


def test_strip_of_frames(tmp_path):
    clip = make_clip(side=8, frames=12, coarse_only=0.1, coarse_fine=0.8)
    assert_drawn(plot_strip(clip, tmp_path / "strip", max_frames=5))
    with pytest.raises(ValueError, match="it has coarse_only, coarse_fine"):
        plot_strip(clip, tmp_path / "strip", modes=["autoregressive"])


def test_palette_has_no_repeated_colours():
    assert len(set(style.PALETTE)) == len(style.PALETTE)


def test_table_reports_file_line_and_cell(tmp_path):
    path = tmp_path / "odd.csv"
    path.write_text("step,loss\n1,2\n2,many\n")
    with pytest.raises(ValueError, match=r"odd\.csv: column 'loss', row 2: 'many' is not a number"):
        read_csv(path).numbers("loss")
    path.write_text("step,loss\n1\n")
    with pytest.raises(ValueError, match="line 2 has 1 cells, the header has 2"):
        read_csv(path)
    path.write_text("step,loss\n")
    with pytest.raises(ValueError, match="no rows"):
        read_csv(path)
    path.write_text("")
    with pytest.raises(ValueError, match="empty file"):
        read_csv(path)


def test_table_reads_gaps_as_nan_and_selects(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("arm,loss\nx,1.5\ny,\nx,0.5\n")
    table = read_csv(path, ["arm", "loss"])
    assert np.isnan(table.numbers("loss")[1])
    assert table.where(arm="x").numbers("loss").tolist() == [1.5, 0.5]
    assert not table.where(arm="y").has("loss")


def test_jsonl_is_a_table_of_one_kind(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"kind":"step","step":1}\n{"kind":"evaluation","step":2,"slots/x/n":3}\n{"kind":"evaluation","step":4}\n'
    )
    table = read_jsonl(path, "evaluation")
    assert table.under("slots/x/", ["step"]).columns == {"step": ["2", "4"], "n": ["3", ""]}
    path.write_text("{broken\n")
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        read_jsonl(path, "evaluation")
