"""Executes the notebooks of this folder and stores what they show: `make notebooks`, or `python notebooks/execute.py NAME...`."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

FOLDER = Path(__file__).parent
BUILD = FOLDER.parent / "build"


def code_digest(notebook: nbformat.NotebookNode) -> str:
    """Of the code cells: stored with the outputs, it tells whether these are of this code."""
    return hashlib.sha256("\x1f".join(cell.source for cell in notebook.cells if cell.cell_type == "code").encode()).hexdigest()[:16]


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with new outputs, run in `folder`, where it finds wheels/ if there is a build/wheels. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    folder.mkdir(parents=True, exist_ok=True)
    (BUILD / "wheels").mkdir(parents=True, exist_ok=True)
    if not (folder / "wheels").exists():
        (folder / "wheels").symlink_to(BUILD / "wheels", target_is_directory=True)
    with tempfile.TemporaryDirectory() as sockets:  # a short path, which is all that a socket may have
        client = NotebookClient(notebook, config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"}), kernel_name="python3",
                                timeout=600, resources={"metadata": {"path": str(folder)}}, record_timing=False)
        client.execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"},
                         "stllava": {"code": code_digest(notebook)}}
    return notebook


def main(names: list[str]) -> None:
    from stllava.checkpoint.atomic import remove_directory, write_bytes
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            folder = BUILD / "notebooks" / path.stem
            if folder.exists():
                remove_directory(folder)
            write_bytes(path, (nbformat.writes(execute(path, folder)) + "\n").encode())
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
