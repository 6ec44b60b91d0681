"""Notebooks: each jupytext pair says the same, carries no outputs, and runs on a run directory."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

from tests.synthetic_run import write_synthetic_run

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NAMES = sorted({path.stem for path in NOTEBOOKS.glob("*.*")})

# Python's -W error would stop the kernel itself at its own deprecations; the cells start here.
STRICT = "import warnings\n\nwarnings.simplefilter('error')"


def test_there_are_notebooks() -> None:
    assert "01_read_a_run" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_pair_is_in_sync(name: str) -> None:
    """If this fails: jupytext --update --to ipynb notebooks/NAME.py"""
    script, notebook = (
        jupytext.read(NOTEBOOKS / f"{name}.{extension}") for extension in ("py", "ipynb")
    )
    cells = [(cell.cell_type, cell.source) for cell in script.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in notebook.cells]
    outputs = [c.outputs for c in notebook.cells if c.cell_type == "code" and c.outputs]
    assert outputs == [], "clear the outputs before committing"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a kernel of this very interpreter; an installed "python3" may be another or none."""
    folder = tmp_path / "jupyter/kernels/this_python"
    folder.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "this Python", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    # Nothing of the user's own profile, and no writing to it.
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    return folder.name


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_a_run_directory(
    name: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXRL_LLM_RUN", str(write_synthetic_run(tmp_path / "run")))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name=kernel, resources={"metadata": {"path": str(NOTEBOOKS)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    figures = [o for o in outputs if o.output_type == "display_data" and "image/png" in o.data]
    if name == "01_read_a_run":
        assert "avg_at_k          87.0%  [83.0%, 91.0%]" in text
        assert "3 times: replay r3 covered 0.93" in text
        assert "+0.50  correct" in text
        assert len(figures) == 3
    if name == "02_first_order":
        assert "341 responses" in text
        found = re.search(r"order of the error: objective (\S+), gradient (\S+)", text)
        assert found is not None
        assert float(found[1]) == pytest.approx(2, abs=0.1)
        assert float(found[2]) == pytest.approx(1, abs=0.1)
        assert text.count("with_numerics") == 2
        assert len(figures) == 1
        drawn = [o for o in outputs if o.output_type == "execute_result" and "image/png" in o.data]
        assert len(drawn) == 1
