"""From a grid's CSV to what it says: planted scaling is found, and what is not there is not."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from fvlm.research.scaling.optimal import fit_grid, write_fits
from fvlm.research.scaling.report import fits_report
from fvlm.research.study.rows import study_runs
from fvlm.research.tables import Table

SIZES = (1e7, 3e7, 1e8, 3e8, 1e9)
BUDGETS = (1e16, 4e16, 1.6e17, 6.4e17)
FLOPS = 3000.0  # a parameter and sample: κ = 1
ALPHA, BETA = 0.34, 0.28


def loss_of(size, samples, floor=1.7, per_size=400.0, per_sample=60.0):
    return floor + per_size * size**-ALPHA + per_sample * samples**-BETA


def rows(noise=0.001, seed=0, sizes=SIZES, budgets=BUDGETS, kinds=None):
    """A grid's results; a kind: (columns, loss of size and samples)."""
    random = np.random.default_rng(seed)
    kinds = {"foveated": ({"tokens_per_frame": 1}, loss_of)} if kinds is None else kinds
    for kind, (columns, loss) in kinds.items():
        for size in sizes:
            for budget in budgets:
                samples = budget / (FLOPS * size)
                value = loss(size, samples) * np.exp(noise * random.standard_normal())
                yield {
                    "run": f"{kind}-{size:g}-{budget:g}", "status": "done", "size": f"{size:.0e}", "budget": budget,
                    "architecture": kind, **columns, "parameters": size, "samples": samples, "train_flops": budget,
                    "val_loss": value, "loss_low": value - 2e-3, "loss_high": value + 2e-3, "comparison": "isoflop",
                }  # fmt: skip


def fit(made, **arguments):
    made = list(made)
    names = list(dict.fromkeys(name for row in made for name in row))
    table = Table({name: [str(row.get(name, "")) for row in made] for name in names}, "made up")
    return fit_grid(study_runs(table), **arguments)


FOVEATED = "foveated, 1 token a frame"
BASELINE = "16 pooled tokens a frame"


def test_planted_allocation_is_found_by_parabolas_and_by_the_law():
    found = fit(rows())["kinds"][FOVEATED]
    a = BETA / (ALPHA + BETA)
    law = found["parametric"]
    assert law["refused"] == []
    assert law["flops_per_sample_exponent"] == pytest.approx(1)
    assert law["size_exponent"]["value"] == pytest.approx(a, rel=0.05)
    assert law["sample_exponent"]["value"] == pytest.approx(1 - a, rel=0.05)
    assert law["size_exponent"]["low"] < a < law["size_exponent"]["high"]
    exponents = {name: found["allocation"][name]["exponent"] for name in ("size", "samples")}
    assert exponents["size"]["low"] < a < exponents["size"]["high"]
    assert exponents["size"]["value"] == pytest.approx(a, rel=0.1)  # a parabola is not the law
    assert exponents["size"]["value"] + exponents["samples"]["value"] == pytest.approx(1, rel=0.02)


def test_the_best_size_of_a_budget_is_the_laws():
    found = fit(rows(noise=1e-5))["kinds"][FOVEATED]
    fine = np.geomspace(SIZES[0], SIZES[-1], 2000)
    for each in found["isoflop"]:
        assert each["refused"] == ""
        best = fine[np.argmin(loss_of(fine, each["budget"] / (FLOPS * fine)))]
        assert np.log(each["optimum"]["value"] / best) == pytest.approx(0, abs=0.35)  # sizes are 1.1 apart
        assert each["samples"]["value"] * each["optimum"]["value"] * FLOPS == pytest.approx(each["budget"], rel=0.02)


def test_enough_budgets_lead_ten_times_further_and_few_do_not():
    ahead = fit(rows())["kinds"][FOVEATED]["allocation"]["ahead"]
    assert ahead["refused"] == ""
    assert ahead["compute"] == pytest.approx(6.4e18)
    assert ahead["size"]["low"] < ahead["size"]["value"] < ahead["size"]["high"]
    few = fit(rows(budgets=BUDGETS[:3]))["kinds"][FOVEATED]["allocation"]["ahead"]
    assert "3 budgets" in few["refused"]
    assert "size" not in few


def test_three_sizes_at_two_budgets_are_refused_with_reasons():
    found = fit(rows(sizes=SIZES[1:4], budgets=BUDGETS[:2]))["kinds"][FOVEATED]
    assert "2 budgets" in found["allocation"]["refused"] or "of 2 budgets" in found["allocation"]["refused"]
    assert any("6 runs" in reason for reason in found["parametric"]["refused"])


def shifted(size, samples):
    """A kind that learns faster and ends higher: ahead at first, behind at last."""
    return loss_of(size, samples, floor=2.65, per_sample=25.0)


def two_kinds(baseline):
    return {
        "foveated": ({"tokens_per_frame": 1}, loss_of),
        "multi_token": ({"grid": 16, "tokens_per_frame": ""}, baseline),
    }


def lowest(loss, budget):
    return min(loss(size, budget / (FLOPS * size)) for size in SIZES)


def test_a_planted_crossover_is_found():
    differences = [lowest(loss_of, budget) - lowest(shifted, budget) for budget in BUDGETS]
    assert differences[0] > 0 > differences[-1]
    found = fit(rows(noise=2e-4, kinds=two_kinds(shifted)))["crossover"]
    assert found["kinds"] == [FOVEATED, BASELINE]
    fine = np.geomspace(BUDGETS[0], BUDGETS[-1], 400)
    truth = fine[np.argmin(np.abs([lowest(loss_of, budget) - lowest(shifted, budget) for budget in fine]))]
    assert found["compute"]["low"] < found["compute"]["value"] < found["compute"]["high"]
    assert found["compute"]["value"] == pytest.approx(truth, rel=0.3)
    assert found["text"].startswith(f"{FOVEATED} takes the lead at")


def test_no_crossover_is_said_with_how_sure_it_is():
    found = fit(rows(noise=2e-4, kinds=two_kinds(lambda n, d: loss_of(n, d) + 0.1)))["crossover"]
    assert found["compute"] is None
    assert "no crossover" in found["text"]
    assert f"{FOVEATED} has the lower loss at every budget" in found["text"]
    assert "beyond the noise at 4 of 4 budgets" in found["text"]


def test_sizes_without_a_name_are_compared_whatever_their_parameters():
    """The kinds' models of a size differ by 0.3 % in their parameters, and the best size is not the smallest."""
    made = list(rows(noise=0, kinds=two_kinds(lambda n, d: loss_of(n, d) + 0.05)))
    named = fit(made)["crossover"]
    for row in made:
        del row["size"]
        row["parameters"] *= 1.003 if row["architecture"] == "multi_token" else 1
    found = fit(made)["crossover"]
    assert found["losses"] == {kind: pytest.approx(losses) for kind, losses in named["losses"].items()}


def test_a_failed_run_favours_no_kind():
    made = list(rows(noise=0, kinds=two_kinds(lambda n, d: loss_of(n, d) + 0.01)))
    own = [row for row in made if row["budget"] == BUDGETS[2] and row["architecture"] == "foveated"]
    best = min(own, key=lambda row: row["val_loss"])
    best["status"] = "failed"
    assert "by 0.0100 to 0.0100 nats" in fit(made)["crossover"]["text"]


def test_one_size_is_no_choice():
    kind = fit(row for row in rows() if row["parameters"] == SIZES[0])["kinds"][FOVEATED]
    assert kind["choice"]["size"] == ""
    assert "one size alone" in kind["choice"]["reasons"][0]


def test_a_crossover_within_the_noise_is_not_one():
    found = fit(rows(noise=0.01, kinds=two_kinds(loss_of)))["crossover"]
    assert found["compute"] is None


def test_the_smaller_of_two_sizes_that_noise_cannot_tell_apart_is_taken():
    made = [row for row in rows(sizes=(1e7, 3e7, 1e8), noise=0) if row["budget"] == BUDGETS[-1]]
    for row, value in zip(made, (2.30, 2.001, 2.0), strict=True):
        row |= {"val_loss": value, "loss_low": value - 0.01, "loss_high": value + 0.01}
    choice = fit(made)["kinds"][FOVEATED]["choice"]
    assert choice["size"] == "3e+07"
    assert any("less than the" in reason for reason in choice["reasons"])
    for row, value in zip(made, (2.30, 2.1, 2.0), strict=True):
        row |= {"val_loss": value, "loss_low": value - 0.01, "loss_high": value + 0.01}
    choice = fit(made)["kinds"][FOVEATED]["choice"]
    assert choice["size"] == "1e+08"
    assert any("largest size of the grid" in reason for reason in choice["reasons"])


def test_failed_and_unfinished_rows_are_left_out_by_name():
    made = list(rows())
    made[0] |= {"status": "failed", "reason": "out of memory", "val_loss": "", "samples": ""}
    made[1] |= {"val_loss": ""}
    made[2]["comparison"] = "isosample"
    found = fit(made)
    assert found["left_out"] == {made[0]["run"]: "failed: out of memory", made[1]["run"]: "no positive loss on record"}
    kind = found["kinds"][FOVEATED]
    assert made[2]["run"] in kind["runs"]
    assert all(made[2]["run"] not in each["runs"] for each in kind["isoflop"])


def test_runs_that_are_left_out_for_the_same_reason_share_a_line():
    found = fit(rows()) | {"left_out": {"a": "not_run", "b": "failed: out of memory", "c": "not_run"}}
    assert fits_report(found).endswith("- not_run: `a`, `c`\n- failed: out of memory: `b`\n")


def test_seeds_tell_the_noise():
    made = [row | {"run": f"{row['run']}-{seed}"} for seed in range(3) for row in rows(noise=0.004, seed=seed)]
    for row in made:
        row |= {"loss_low": "", "loss_high": ""}
    kind = fit(made)["kinds"][FOVEATED]
    assert kind["noise_from"] == "the spread of repeated runs"
    assert kind["noise"] == pytest.approx(0.004 * np.mean([row["val_loss"] for row in made]), rel=0.4)


def test_a_foreign_csv_with_few_columns(tmp_path):
    """No status, no labels, no intervals: budgets are found by their operations."""
    path = tmp_path / "theirs.csv"
    keep = ("run", "architecture", "tokens_per_frame", "parameters", "samples", "train_flops", "val_loss")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, keep, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row | {"train_flops": row["train_flops"] * 1.01} for row in rows())
    found = write_fits(path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "fits.json").read_text()) == json.loads(json.dumps(found))
    kind = found["kinds"][FOVEATED]
    assert [each["budget"] for each in kind["isoflop"]] == pytest.approx([1.01 * budget for budget in BUDGETS])
    assert kind["parametric"]["refused"] == []
    text = (tmp_path / "out" / "fits.md").read_text()
    assert "## Foveated, 1 token a frame" in text
    assert "N ∝ C^a" in text


def test_the_report_has_a_reason_in_the_place_of_every_number_that_is_refused(tmp_path):
    path = tmp_path / "results.csv"
    made = list(rows(sizes=SIZES[:2]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(made[0]))
        writer.writeheader()
        writer.writerows(made)
    write_fits(path, tmp_path)
    text = (tmp_path / "fits.md").read_text()
    assert text.count("refused: 2 size(s): a parabola needs 3") == len(BUDGETS)
    assert "N(C) and D(C) are refused: 0 of 4 budgets have an optimum" in text
    assert "2 sizes: what the loss owes to it needs 3 or more" in text


def test_nothing_done_yet_is_a_report_too(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("run,status,reason,samples\na,failed,it broke,\nb,not_run,,\n")
    found = write_fits(path, tmp_path)
    assert found["kinds"] == {}
    assert found["crossover"] is None
    assert "- failed: it broke: `a`\n" in (tmp_path / "fits.md").read_text()
