"""The notebook, run from its first cell to its last as somebody who opens it would."""

from __future__ import annotations

import nbclient
import nbformat
import pytest


def run(path) -> nbformat.NotebookNode:
    """The notebook with what its cells print and draw; raises CellExecutionError where one fails."""
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    return notebook


@pytest.mark.slow
def test_from_a_video_to_an_answer_to_heat_maps(repo_root):
    notebook = run(repo_root / "docs" / "notebook.ipynb")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "'frames': (1, 5, 3, 56, 56)" in printed
    assert "autoregressive: " in printed
    assert "5 seen: " in printed
    drawn = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(set(drawn)) == 2
