"""The notebooks as they are stored, and run again; and what they show by itself."""

from __future__ import annotations

import base64
import getpass
import importlib.util
import io
import re
import socket
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import numpy as np
import pytest
from PIL import Image
from tiny import dpo_records, sft_records, tiny_model, write_pictures

import stllava_c
from stllava import DPODataset, LossPlot, PictureTable, SFTDataset
from stllava.notebook import NotebookBar
from stllava.progress import in_notebook
from stllava.train.callbacks import TrainerState
from stllava.train.loop import TrainOutput

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("fine_tune", "self_train_and_evaluate")
MOST_BYTES = 300_000


def execute_module():
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell showed, without the content: elements may be drawn again, streams come in pieces."""
    return sorted({kind for output in cell.outputs for kind in (output.get("data") or {output.get("name", output.output_type): 1})})


def test_both_are_there():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_notebook_was_run_with_its_code(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata["stllava"]["code"] == execute_module().code_digest(notebook), f"code was changed: `python notebooks/execute.py {name}`"
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert len(text.encode()) < MOST_BYTES
    assert sum(str(output.get("data", {}).get("text/html", "")).count("<img ") for output in outputs) >= 8
    assert any("<svg" in str(output.get("data", {}).get("text/html", "")) for output in outputs)
    shown = re.sub(r'"data:image/png;base64,[^"]*"', "", "\n".join(str(output) for output in outputs))
    for private in (r"/home/|/root|/tmp|/work|/Users|site-packages| at 0x", re.escape(socket.gethostname()), rf"\b{re.escape(getpass.getuser())}\b"):
        assert not re.search(private, shown), f"{private} is in what {name} shows"


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_shows_the_same_kinds_of_things(name, tmp_path):
    if stllava_c.build_info()["sanitizers"]:
        pytest.skip("a training takes many minutes under AddressSanitizer; test_train_loop and test_selftrain make the same calls")
    stored = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    again = execute_module().execute(FOLDER / f"{name}.ipynb", tmp_path / name)
    assert [kinds(cell) for cell in code_cells(again)] == [kinds(cell) for cell in code_cells(stored)]
    assert again.metadata == stored.metadata


# ---- what they are made of -------------------------------------------------------------------------------------------------------


def test_a_loss_plot_is_a_small_picture_of_all_steps():
    plot, state = LossPlot("loss", "eval_loss"), TrainerState()
    assert repr(plot) == "LossPlot(nothing yet)" == plot._repr_html_()
    state.log_history = [{"step": 1, "loss": 5.0}, {"step": 2, "skipped": "Inf"}]
    plot.on_train_begin(None, state, None)
    for step in range(3, 5001):
        state.global_step = step
        plot.on_log(None, state, None, logs={"loss": 5 / step})
    state.global_step = 5000
    plot.on_log(None, state, None, logs={"loss": float("nan")})
    plot.on_log(None, state, None, logs={"eval_loss": 0.5, "eval_accuracy": 1.0})
    assert repr(plot) == "LossPlot(loss 5 to nan in 5000 steps; eval_loss 0.5 to 0.5 in 5000 steps)"
    html = plot._repr_html_()
    assert len(html) < 20_000
    first, second = ElementTree.fromstring(f"<div>{html}</div>")
    lines = [line.get("points").split() for line in first.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(line) for line in lines] == [400, 400] and len(first) == len(second) == 9
    for x, y in (map(float, point.split(",")) for line in lines for point in line):
        assert 0 <= x <= 460 and 0 <= y <= 170
    assert "no finite value" in LossPlot_of([(1, float("nan"))])


def LossPlot_of(points):
    plot = LossPlot("loss")
    plot.points["loss"] = points
    return plot._repr_html_()


def test_a_picture_table_shows_pictures_small_and_texts_as_they_are(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    png = (tmp_path / "a.png").read_bytes()
    table = PictureTable([{"picture": kind, "text": "<b>1 & 2</b>\nline"} for kind in (tmp_path / "a.png", png, array, Image.fromarray(array))], size=40)
    html = table._repr_html_()
    sources = re.findall(r'src="data:image/png;base64,([^"]*)"', html)
    assert len(sources) == 4 and len(set(sources)) == 1
    assert Image.open(io.BytesIO(base64.b64decode(sources[0]))).size == (40, 30)
    assert html.count("&lt;b&gt;1 &amp; 2&lt;/b&gt;<br>line") == 4
    assert repr(table).splitlines()[0] == "(picture)   <b>1 & 2</b>"


def test_a_bar_is_one_element(monkeypatch):
    shown = []

    class Handle:
        def update(self, what):
            shown.append(what._repr_html_())

    monkeypatch.setattr("IPython.display.display", lambda what, display_id: shown.append(what._repr_html_()) or Handle())
    with NotebookBar(total=3, initial=1, desc="<ask>", unit="item") as bar:
        bar.update(2)
    assert 'max="3" value="1"' in shown[0] and 'max="3" value="3"' in shown[-1] and "&lt;ask&gt; <progress" in shown[0]
    assert repr(bar).startswith("<ask>: 3/3 items, ")
    assert not in_notebook()


def test_the_result_of_a_training_is_a_table():
    html = TrainOutput(7, 0.25, {"train_loss": 0.25, "train_runtime": 12.345})._repr_html_()
    assert "<th>train_runtime</th>" in html and "<td>12.35</td>" in html and "<td>7</td>" in html


def test_a_data_set_takes_from_the_model_what_the_model_has(tmp_path):
    model, names = tiny_model(), write_pictures(tmp_path, 2)
    for kind, records in ((SFTDataset, sft_records(names)), (DPODataset, dpo_records(names))):
        data = kind.for_model(model, records, image_folder=tmp_path, max_length=64, template="v1")
        assert (data.tokenizer, data.tokens_per_image, data.max_length) == (model.tokenizer, 16, 64) and len(data) == len(records)
        assert data.pixels(names[0]).shape == (3, 28, 28)
