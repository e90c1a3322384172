"""Notebooks run from the committed records, to the text that they were committed with."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
HANGS = 300  # seconds of one cell
MAX_BYTES = 1_000_000


def texts(notebook: dict[str, Any]) -> list[str]:
    """What each code cell prints, and shows as text; of pictures that they are there."""
    found = []
    for cell in notebook["cells"]:
        outputs = cell.get("outputs", [])
        found.append("".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream"))
        for data in (output["data"] for output in outputs if output["output_type"] != "stream"):
            found.append("picture" if "image/png" in data else "".join(data["text/plain"]))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_reads_well_as_it_is_committed(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    assert path.stat().st_size < MAX_BYTES
    assert cells[0]["cell_type"] == "markdown"
    assert "".join(cells[0]["source"]).startswith("# ")
    assert "picture" in texts(notebook)
    streams = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "stream"]
    assert {stream["name"] for stream in streams} == {"stdout"}
    assert not [text for text in texts(notebook) if str(Path.home()) in text]
    for cell in cells:
        assert len(cell["source"]) <= 25, "".join(cell["source"])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_gives_what_it_shows(path: Path, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    notebook = nbformat.read(path, as_version=4)
    committed = texts(notebook)
    # sockets of the file system: another user of this machine could listen to TCP
    ipc = Config(KernelManager={"transport": "ipc", "ip": str(tmp_path / "kernel")})
    where = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, config=ipc, timeout=HANGS, resources=where).execute()
    assert texts(notebook) == committed


def test_notebooks_hold_outputs_and_nothing_of_the_session_that_made_them() -> None:
    command = [sys.executable, "-m", "nbstripout", "--verify", "--keep-output", *NOTEBOOKS]
    subprocess.run(command, check=True)
