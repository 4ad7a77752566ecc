"""The benchmarks by name, from a folder to questions."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fvlm.evaluate.benchmarks import mlvu, mvbench, pope, scienceqa, videomme
from fvlm.evaluate.benchmarks.base import Benchmark, prepare
from fvlm.evaluate.items import Presentation, every_nth
from fvlm.schema import ConfigError

logger = logging.getLogger(__name__)
READERS = {
    "videomme": videomme.read,
    "mvbench": mvbench.read,
    "mlvu": mlvu.read,
    "pope": pope.read,
    "scienceqa": scienceqa.read,
}


def open_benchmark(
    name: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    presentation: Presentation,
    *,
    most_questions: int | None = None,
) -> Benchmark:
    """The benchmark in `folder`/`name`, laid out there as it is published; of more questions than wanted, every n-th.

    Raises ConfigError where there is no such folder, no annotation file, or not a single question in it.
    """
    place = folder / name
    if not place.is_dir():
        raise ConfigError(f"--benchmark-data: no folder {place}")
    rows, not_asked = READERS[name](place)
    if not rows:
        raise ConfigError(f"{place}: no question can be asked; not asked: {dict(not_asked) or 'nothing there'}")
    rows = every_nth(rows, most_questions)
    benchmark = prepare(name, rows, not_asked, tokenizer, presentation)
    unasked = f", {not_asked.total()} rows not asked ({dict(not_asked)})" if not_asked else ""
    lost = f", {benchmark.skipped.total()} cannot be shown ({dict(benchmark.skipped)})" if benchmark.skipped else ""
    logger.info("%s: %d questions%s%s", name, len(rows), lost, unasked)
    return benchmark
