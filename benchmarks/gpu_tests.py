"""Command: run tests and record how many passed, so that a machine's results say what was checked on it."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import ROOT, fail, record, write_json

DESCRIPTION = """Run pytest and write a JSON of what passed, failed and was skipped.

example:
  python -m benchmarks.gpu_tests --json out/tests.json tests/kernels -n 8
"""


class Outcomes:
    """A pytest plug-in that counts tests by outcome and keeps the names of those that failed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []
        self.seconds = 0.0

    def pytest_runtest_logreport(self, report) -> None:
        """Called by pytest for each test's set-up, call and tear-down."""
        self.seconds += report.duration
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" or report.skipped:
            self.counts[report.outcome] += 1

    def pytest_collectreport(self, report) -> None:
        """Called by pytest for each file that it looks for tests in."""
        if report.failed:
            self.failed.append(report.nodeid)

    def figures(self) -> dict[str, float]:
        """Flat, for the result file."""
        return {
            "passed": self.counts["passed"],
            "failed": len(set(self.failed)),
            "skipped": self.counts["skipped"],
            "test_seconds": round(self.seconds, 1),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 all passed, 1 something failed or nothing was found, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_tests",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    asked, for_pytest = parser.parse_known_args(arguments)
    import pytest

    outcomes = Outcomes()
    code = pytest.main([f"--rootdir={ROOT}", *for_pytest], plugins=[outcomes])
    figures = outcomes.figures()
    write_json(asked.json, record("benchmarks.gpu_tests", arguments, figures, failed=sorted(set(outcomes.failed))))
    if code != 0 or not figures["passed"]:
        return fail(f"pytest's exit code is {int(code)}, {figures['passed']} tests passed, {figures['failed']} failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
