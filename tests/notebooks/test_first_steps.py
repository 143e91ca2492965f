"""The notebook runs from top to bottom, on the demo's tiny models in the place of SmolVLM and SmolLM2."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from older import loads_processors

import drift_peft.demo

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "first_steps.ipynb"
CHECKPOINTS = Path(drift_peft.demo.__file__).parent / "checkpoints"
SETTINGS = f"""
VLM, TEXT, EXPERT = {str(CHECKPOINTS / "vlm")!r}, {str(CHECKPOINTS / "base")!r}, None
EXPERT_STEPS, STEPS, BATCH, RATE = 2, 6, 4, 5e-3
KEEP_SAMPLES, ZOOM = 4, 1
SOLVE, READ = "solve?", "read?"
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that it ran in, and its cells."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", ())
        if "parameters" in tags:
            given = set(re.findall(r"\b[A-Z_]{3,}(?=[\w, ]* =)", cell.source))
            assert given == set(re.findall(r"\b[A-Z_]{3,}(?=[\w, ]* =)", SETTINGS)), "a setting that the test lacks"
            cell.source = SETTINGS
        elif "install" in tags:
            cell.source = ""
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return folder, notebook.cells


def output(cells, word):
    """What the cell whose source has the word shows last, by its type; or all that it has printed."""
    (cell,) = (cell for cell in cells if cell.cell_type == "code" and word in cell.source)
    last = cell.outputs[-1]
    printed = [part["text"] for part in cell.outputs if part.get("name") == "stdout"]
    return last["data"] if "data" in last else "".join(printed)


@loads_processors
@pytest.mark.slow
def test_every_step_leaves_what_the_next_one_needs(ran):
    folder, cells = ran
    assert {path.name for path in folder.iterdir()} >= {"expert", "prior.safetensors", "keep.safetensors", "adapter"}
    assert "&lt;h1&gt;" in output(cells, "build_prior(EXPERT")["text/html"]
    assert "image/png" in output(cells, "optimizer = torch.optim.AdamW([p for p")
    table = output(cells, "after = answers")["text/html"]
    assert table.count("<img") == 8 and table.count("<tr>") == 9
    merged = output(cells, "merge_adapter(VLM")
    assert re.fullmatch(r"28 modules merged into merged; 8 of 8 answers are the same\n", merged)
    assert (folder / "merged" / "config.json").is_file()


def test_it_says_that_it_was_not_run_on_a_t4():
    """Remove this when somebody has."""
    first = nbformat.read(NOTEBOOK, as_version=4).cells[0].source
    assert "T4" in first and "Nobody has run it there yet" in first


def test_it_is_kept_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)
