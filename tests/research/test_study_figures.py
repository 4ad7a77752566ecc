"""Figures of studies come out of their CSVs alone, say which runs are in them, and say why others are not drawn."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from fvlm.evaluate.maps import load_clip, save_clip
from fvlm.research.figures import arm_figures, arm_plots, catalogue, scaling_figures, scaling_plots
from fvlm.research.figures.catalogue import PLANS, write_figures
from fvlm.research.study.records import NotDrawn, read_study
from fvlm.research.study.rows import Spread, accuracy_spread
from fvlm.research.style import STYLE
from fvlm.research.tables import read_csv
from tests.research import made_up_study as made

OF_ARMS = {
    "convergence", "accuracy", "loss_ratio", "entropy", "arms", "freeze", "modes", "families", "family_losses",
    "attention-0", "attention-1", "token_efficiency",
}  # fmt: skip
OF_GRIDS = {"isoflop", "crossover", "data_scaling", "allocation", "parametric"}


TWINS = {"accuracy", "loss_ratio", "entropy", "freeze", "family_losses", "attention-1"}
"""Of other columns, by the same functions as figures beside them."""


def write_studies(folder: Path) -> list[Path]:
    """An ablation study, and a grid without curves."""
    ablations = made.write_study(folder / "ablations", made.ablation_rows())
    grid = made.fit(made.write_study(folder / "grid", made.grid_rows(), maps=False))
    (grid / "curves.csv").unlink()
    return [ablations, grid]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """The figures of both, but for twins, in few dots."""
    folder = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STYLE, "savefig.dpi", 50)
        patch.setattr(catalogue, "PLANS", [plan for plan in PLANS if plan.name not in TWINS])
        path, _ = write_figures(write_studies(folder), folder / "figures")
    return path


@pytest.fixture
def without_drawing(monkeypatch):
    """For tests of what is listed: drawing takes seconds."""

    def stems(*arguments: Any, **_: Any) -> tuple[Path, Path]:
        stem = next(each for each in arguments if isinstance(each, Path))
        return stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")

    for module in (arm_figures, scaling_figures):
        for name in [name for name in vars(module) if name.startswith("plot_")]:
            monkeypatch.setattr(module, name, stems)


@pytest.fixture
def only(monkeypatch):
    """only(name, ...): no other figures."""

    def choose(*names: str) -> None:
        monkeypatch.setattr(catalogue, "PLANS", [plan for plan in PLANS if plan.name in names])

    return choose


def drawn_names(path: Path, study: str = "") -> set[str]:
    found = re.findall(r"^!\[[^\]]*\]\(([^)]+)\.png\)", path.read_text(), re.MULTILINE)
    return {name.removeprefix(f"{study}-") for name in found if name.startswith(study)}


def test_every_figure_that_a_study_holds_is_listed(tmp_path, without_drawing):
    path, count = write_figures(write_studies(tmp_path), tmp_path / "figures")
    assert drawn_names(path, "ablations") == OF_ARMS
    assert drawn_names(path, "grid") == OF_GRIDS | {"arms", "families", "family_losses", "token_efficiency"}
    assert count == len(drawn_names(path))


def test_what_is_listed_is_drawn(drawn):
    assert drawn_names(drawn, "ablations") == OF_ARMS - TWINS
    for linked in re.findall(r"\]\(([^)]+)\)", drawn.read_text()):
        path = drawn.parent / linked
        assert path.is_file(), linked
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10, (
                    f"{linked} is empty"
                )


def test_captions_name_runs_and_commit(tmp_path, without_drawing):
    path, _ = write_figures(write_studies(tmp_path), tmp_path / "figures")
    text = path.read_text()
    captions = [line for line in text.splitlines() if "([vector form]" in line]
    assert len(captions) == len(drawn_names(path))
    assert all(f"commit {made.COMMIT[:12]}" in caption for caption in captions)
    freeze = next(caption for caption in captions if "freez" in caption)
    assert "runs: `F3-s0`, `F3-s1`, `F1-s0`." in freeze
    assert not any("LR4-s0" in caption for caption in captions), "a failed run is in no figure"


def test_planned_and_done_runs_are_counted_alike(tmp_path, without_drawing):
    rows = [made.arm("P", "start", ""), *made.ablation_rows()]
    path, _ = write_figures([made.write_study(tmp_path / "a", rows, maps=False)], tmp_path / "figures")
    assert f"| a | {len(rows)} | {sum(row['status'] == 'done' for row in rows)} |" in path.read_text()


def test_what_is_not_drawn_is_listed_with_its_reason(drawn):
    listed = drawn.read_text().split("## Not drawn")[1]
    assert "| convergence | grid | no curves.csv |" in listed
    assert "| isoflop | ablations | results.csv has no done run with budget, parameters and a loss |" in listed
    assert "| modes | grid | results.csv has no run with accuracies in two modes |" in listed
    assert not any((drawn.parent / f"grid-modes.{kind}").exists() for kind in ("png", "svg"))


def test_equal_tables_give_equal_files(tmp_path, only):
    study = made.write_study(tmp_path / "ablations", made.ablation_rows(), maps=False)
    only("modes", "token_efficiency")
    for out in ("one", "two"):
        assert write_figures([study], tmp_path / out)[1] == 2
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("file", "column", "figure", "why"),
    [
        ("curves.csv", "loss_ratio", "loss_ratio", "curves.csv has no loss_ratio"),
        ("families.csv", "accuracy", "families", "families.csv has no accuracy"),
        ("results.csv", "changed", "freeze", "results.csv has no done run whose `changed` names `freeze`"),
        ("results.csv", "accuracy_coarse_only", "modes", None),
        ("curves.csv", None, "entropy", "no curves.csv"),
        ("curves.csv", "samples_seen", "convergence", "curves.csv has no samples_seen"),
        ("families.csv", "mode", "families", "families.csv has no mode"),
        ("results.csv", "status", "modes", None),
    ],
)
def test_a_column_that_lacks_costs_its_figure_alone(tmp_path, only, without_drawing, file, column, figure, why):
    rows = [row for row in made.ablation_rows() if row["status"] == "done"]
    study = made.write_study(tmp_path / "ablations", rows, maps=False)
    if column is None:
        (study / file).unlink()
    else:
        made.drop_column(study / file, column)
    only(figure)
    path, count = write_figures([study], tmp_path / "figures")
    assert count == (why is None)
    assert why is None or f"| {figure} | ablations | {why} |" in path.read_text()


def test_a_single_foreign_csv_is_a_study(tmp_path, only, without_drawing):
    theirs = tmp_path / "theirs.csv"
    theirs.write_text(
        "run,architecture,tokens_per_frame,grid,flops_per_sample,accuracy_coarse_fine,note\n"
        "one,foveated,1,,2e9,0.8,good\nmany,multi_token,,16,3e9,0.7,\n"
    )
    only("token_efficiency", "modes", "convergence")
    path, count = write_figures([theirs], tmp_path / "figures")
    text = path.read_text()
    assert count == 1
    assert "runs: `one`, `many`." in text
    assert "| convergence | theirs | no curves.csv |" in text


def test_a_table_as_a_spreadsheet_saves_it(tmp_path):
    path = tmp_path / "theirs.csv"
    path.write_bytes("\ufeffrun,samples\r\none,5\r\n\r\n".encode())
    assert read_csv(path, ["run"]).columns == {"run": ["one"], "samples": ["5"]}
    path.write_bytes("\ufeffrun,samples\r\n\r\none\r\n".encode())
    with pytest.raises(ValueError, match="line 3 has 1 cells, the header has 2"):
        read_csv(path)


def test_captions_name_what_is_drawn_alone(tmp_path, only, without_drawing):
    """The base was not run, nothing says what chance is, and one arm diverged."""
    rows = [row | {"chance": ""} for row in made.ablation_rows()]
    rows = [row | {"status": "not_run"} if row["arm"] == "F3" else row for row in rows]
    only("arms", "convergence")
    path, _ = write_figures([made.write_study(tmp_path / "a", rows, maps=False)], tmp_path / "figures")
    assert not any(words in path.read_text() for words in ("black is", "the band is", "dashed line is chance"))
    whole, _ = write_figures([made.write_study(tmp_path / "b", made.ablation_rows())], tmp_path / "whole")
    assert all(words in whole.read_text() for words in ("black is", "the band is", "dashed line is chance"))


def test_tables_that_cannot_be_read_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no results\.csv; expected a study's folder"):
        read_study(tmp_path)
    study = made.write_study(tmp_path / "a", [made.arm("F3", "", "")], maps=False)
    bad = (study / "results.csv").read_text().replace(",0.6,", ",much,", 1)
    (study / "results.csv").write_text(bad)
    with pytest.raises(ValueError, match=r"results\.csv: column 'val_loss', row 1: 'much' is not a number"):
        read_study(study)
    twice = made.write_study(tmp_path / "b", [made.arm("F3", "", "")] * 2, maps=False)
    with pytest.raises(ValueError, match=r"results\.csv: run F3-s0 is named in more than one row"):
        read_study(twice)
    namesakes = [made.write_study(tmp_path / part / "c", [made.arm("F3", "", "")], maps=False) for part in "de"]
    with pytest.raises(ValueError, match="two studies are called 'c'"):
        write_figures(namesakes, tmp_path / "figures")


def test_decisions_rest_on_the_base_and_on_the_plainest_controls(tmp_path):
    first = made.coarse_arm("Q_coarse") | {"changed": "train.mode: 1 → 2; data.mixture.question_first: 0 → 1"}
    start = made.arm("P", "start", "")
    study = read_study(made.write_study(tmp_path / "a", [start, first, *made.ablation_rows()], maps=False))
    assert study.base_arm() == "F3"
    assert [run.name for run in study.recipe()] == ["F3-s0", "F3-s1"]
    assert [run.name for run in study.recipe("LR2")] == ["LR2-s0"]
    controls = {kind: [run.name for run in runs] for kind, runs in study.controls().items()}
    assert controls == {"coarse only, 1 token a frame": ["A6-s0"], "16 pooled tokens a frame": ["B1-s0"]}
    with pytest.raises(ValueError, match="arm 'LR9': not in study a; it has P, Q_coarse, F3"):
        study.recipe("LR9")
    grid = read_study(made.write_study(tmp_path / "g", made.grid_rows(), maps=False))
    assert [run.name for run in grid.recipe()] == [run.name for run in grid.recipe("LR2")] == ["xl-foveated-6.4e+13"]


def test_seeds_are_one_figure_with_the_reach_of_their_intervals(tmp_path):
    study = read_study(made.write_study(tmp_path / "a", made.ablation_rows(), maps=False))
    runs = study.recipe()
    spread = accuracy_spread(runs)
    assert spread.mean == pytest.approx((0.9 + 0.94) / 2)
    assert (spread.low, spread.high) == (runs[0].number("low_coarse_fine"), runs[1].number("high_coarse_fine"))
    assert spread.bounded


def test_difference_of_two_shares_has_newcombes_interval():
    """The example of Newcombe's paper of 1998: 56/70 and 48/80, his method 10 gives 0.0524 to 0.3339."""
    shares = [Spread(values=(k / n,), low=low, high=high, bounded=True) for k, n, low, high in (
        (56, 70, *made.wilson_interval(56, 70)), (48, 80, *made.wilson_interval(48, 80)))]  # fmt: skip
    value, low, high = arm_figures._difference(*shares, "accuracy")
    assert (value, low, high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    loose = Spread(values=(0.5,), low=0.5, high=0.5, bounded=False)
    assert math.isnan(arm_figures._difference(shares[0], loose, "accuracy")[1])


def test_families_are_in_the_order_of_what_looking_is_worth(tmp_path, monkeypatch):
    study = read_study(made.write_study(tmp_path / "a", made.ablation_rows(), maps=False))
    seen = {}

    def catch(series, differences, stem, words, scale):
        seen[scale] = series, differences
        return stem, stem

    monkeypatch.setattr(arm_figures, "plot_families", catch)
    drawn = arm_figures.draw_families(study, tmp_path / "x")
    arm_figures.draw_family_losses(study, tmp_path / "x")
    assert set(drawn.runs) == {"F3-s0", "F3-s1", "A6-s0", "B1-s0"}
    assert "a model trained with one fixed query" in drawn.caption
    series, differences = seen[100]
    assert list(differences) == ["synthetic/cue", "synthetic/relay", "synthetic/text"]
    assert [d[0] for d in differences.values()] == pytest.approx([0.6, 0.1, -0.3])
    assert differences["synthetic/cue"][1] > 0 > differences["synthetic/text"][2]
    assert list(series)[:3] == [f"{mode} (same weights)" for mode in ("autoregressive", "coarse→fine", "coarse only")]
    worth = seen[1][1]
    assert worth["synthetic/cue"][0] == pytest.approx(0.5)
    assert worth["synthetic/text"][0] == pytest.approx(-0.1)
    assert worth["synthetic/cue"][1] == pytest.approx(0.5 - math.hypot(0.05, 0.05))


def test_a_panel_holds_what_its_question_compares(tmp_path):
    rows = [row | {"against": "A6" if row["arm"] == "LR2" else ""} for row in made.ablation_rows()]
    panels, _ = arm_figures._panels(read_study(made.write_study(tmp_path / "a", rows)), "val_loss")
    assert "F3" not in panels["LR"]
    assert next(iter(panels["LR"])) == "A6"
    assert next(iter(panels["F1"])) == "F3"  # where nothing is named, the base


def test_clips_with_something_to_look_for_come_first_and_have_a_row_an_arm(tmp_path, monkeypatch):
    folder = made.write_study(tmp_path / "a", made.ablation_rows())
    for path in folder.glob("*/evaluation/maps/clip-00.npz"):
        clip = load_clip(path)
        save_clip(replace(clip, look_at=np.full_like(clip.look_at, -1)), path)
    shown = []
    monkeypatch.setattr(arm_figures, "plot_strip", lambda clip, stem: shown.append(clip) or (stem, stem))
    study = read_study(folder)
    first, second = (arm_figures.draw_attention(number)(study, tmp_path / "x") for number in range(2))
    assert [clip.key for clip in shown] == ["cue-1", "cue-0"]
    assert "the box marks" in first.caption
    assert "the box marks" not in second.caption
    assert first.runs == ("F3-s0", "A6-s0", "F1-s0", "LR2-s0")  # what looks otherwise comes first
    assert list(shown[0].maps) == ["F3", "A6", "F1", "LR2"]
    own = load_clip(folder / "A6-s0" / "evaluation" / "maps" / "clip-01.npz").maps["coarse_only"]
    assert np.array_equal(shown[0].maps["A6"], own), "each arm in the mode that it trained"
    with pytest.raises(NotDrawn, match=r"maps of 2 clip\(s\)"):
        arm_figures.draw_attention(2)(study, tmp_path / "x")
    shutil.rmtree(folder / "F3-s0")  # a seed whose folder is elsewhere gives way to one that is here
    assert arm_figures.draw_attention(0)(read_study(folder), tmp_path / "x").runs[0] == "F3-s1"


def test_of_a_grid_every_size_of_the_largest_budget_shows_where_it_looks(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(arm_figures, "plot_strip", lambda clip, stem: shown.append(clip) or (stem, stem))
    drawn = arm_figures.draw_attention(0)(read_study(made.write_study(tmp_path / "g", made.grid_rows())), tmp_path)
    assert drawn.runs == tuple(f"{size}-foveated-6.4e+13" for size in made.SIZES)
    assert [row.replace("\n", " ") for row in shown[0].maps] == [
        f"{size}, foveated, 1 token a frame" for size in made.SIZES
    ]


@pytest.mark.parametrize("which", ["x", "y"])
def test_numbers_of_a_short_logarithmic_axis_do_not_overlap(which):
    figure, axes = plt.subplots(figsize=(3.6, 3.3))
    values = [1.37e9, 275e6, 382e6, 441e6, 715e6, 759e6]
    axes.plot(values, values)
    axes.set_yscale("log")
    scaling_plots._log_axis(axes, which, values)
    axis = getattr(axes, f"{which}axis")
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
    ends = [(box.x0, box.x1) if which == "x" else (box.y0, box.y1) for box in boxes]
    assert all(before[1] < after[0] for before, after in pairwise(ends))
    assert [label.get_text() for label in axis.get_ticklabels()] == ["275 M", "382 M", "715 M", "1.37 G"]
    assert np.allclose(axis.get_ticklocs(minor=True), [441e6, 759e6])  # of the others, a mark
    plt.close(figure)


def test_frontier_holds_what_nothing_cheaper_reaches():
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (4.0, 0.9), (8.0, 0.9)]
    assert scaling_plots._frontier(points, falls=False) == ([1.0, 2.0, 4.0], [0.5, 0.7, 0.9])
    assert scaling_plots._frontier(points, falls=True) == ([1.0, 2.0], [0.5, 0.4])


def test_arms_that_cost_what_the_base_does_are_not_on_the_frontier(tmp_path, monkeypatch):
    study = read_study(made.write_study(tmp_path / "a", made.ablation_rows(), maps=False))
    seen = {}
    monkeypatch.setattr(
        scaling_figures,
        "plot_efficiency",
        lambda points, *_, **__: seen.update(arms=[p[1] for p in points]) or (None, None),
    )
    scaling_figures.draw_efficiency(study, tmp_path / "x")
    assert seen["arms"] == ["F3", "A6", "B1"]


def isoflop_panel(study: Path, monkeypatch) -> tuple[dict[str, scaling_plots.Series], str]:
    """The foveated panel, and the caption."""
    seen = {}
    monkeypatch.setattr(scaling_figures, "plot_series", lambda panels, *_, **__: seen.update(panels) or (None, None))
    caption = scaling_figures.draw_isoflop(read_study(study), study / "x").caption
    return seen["foveated, 1 token a frame"], caption


def test_parabolas_are_drawn_where_they_were_fitted(tmp_path, monkeypatch):
    study = made.fit(made.write_study(tmp_path / "g", made.grid_rows(), maps=False))
    panel, caption = isoflop_panel(study, monkeypatch)
    assert list(panel) == ["1e+12 FLOPs", "4e+12 FLOPs", "1.6e+13 FLOPs", "6.4e+13 FLOPs"]
    assert "no line" not in caption
    for series in panel.values():
        sizes = np.geomspace(series.x.min(), series.x.max(), 10_001)
        lowest = sizes[np.argmin(series.fit(sizes))]
        assert series.best[0] == pytest.approx(lowest, rel=1e-3)
        assert series.best[1] == pytest.approx(series.fit(np.array([lowest]))[0], rel=1e-6)


def test_refused_fits_are_not_drawn_and_the_reason_is_said(tmp_path, monkeypatch):
    study = made.fit(made.write_study(tmp_path / "g", made.grid_rows("s", "xl"), maps=False))
    panel, caption = isoflop_panel(study, monkeypatch)
    assert all(series.fit is None for series in panel.values())
    assert "no line for foveated, 1 token a frame, 1e+12 FLOPs: 2 size(s): a parabola needs 3" in caption
    with pytest.raises(NotDrawn, match="foveated, 1 token a frame: no budget has an optimum"):
        scaling_figures.draw_allocation(read_study(study), tmp_path / "x")
    with pytest.raises(NotDrawn, match="was refused: foveated, 1 token a frame: 2 sizes"):
        scaling_figures.draw_parametric(read_study(study), tmp_path / "x")


def test_lowest_loss_at_a_budget_is_that_of_the_best_size(tmp_path, monkeypatch):
    folder = made.write_study(tmp_path / "g", made.grid_rows(), maps=False)
    seen = {}
    monkeypatch.setattr(
        scaling_figures, "plot_crossover", lambda lines, crossing, *_: seen.update(lines) or (None, None)
    )
    drawn = scaling_figures.draw_crossover(read_study(folder), tmp_path / "x")
    assert "no fits.json to say whether they cross" in drawn.caption
    rows = made.grid_rows()
    for kind, architecture in (("foveated, 1 token a frame", "foveated"), ("16 pooled tokens a frame", "multi_token")):
        wanted = [
            min(r["val_loss"] for r in rows if r["budget"] == budget and r["architecture"] == architecture)
            for budget in made.BUDGETS
        ]
        assert seen[kind].y.tolist() == pytest.approx(wanted)


def test_panels_keep_apart_as_many_arms_as_the_palette():
    arms = {f"A{number}": [] for number in range(arm_figures.LINES + 1)}
    split = arm_figures._split({"LR": arms, "Q": {"B": []}})
    assert {title: len(part) for title, part in split.items()} == {"LR (1)": 8, "LR (2)": 1, "Q": 1}
    assert len(arm_plots.MARKERS) >= arm_figures.LINES
