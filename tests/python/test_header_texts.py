"""No text of a medical file's header in anything that is printed, logged, warned, raised or written; and no file name where a message can do without."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pydicom
import pytest
import sentinels
import tiny


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Path, subprocess.CompletedProcess[bytes]]:
    """(pictures, results, what a process said that read them all and ran every verb)."""
    folder, out = tmp_path_factory.mktemp("scans"), tmp_path_factory.mktemp("results")
    (out / "names.json").write_text(json.dumps(sentinels.write(folder, 1 if request.config.getoption("--long") else 20)))
    tiny.tiny_model().save_pretrained(out / "model")
    done = subprocess.run([sys.executable, "-X", "dev", sentinels.__file__, str(folder), str(out / "model"), str(out)], capture_output=True,
                          env=os.environ | {"PYTHONWARNINGS": "always", "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(out)}, timeout=1500)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    return folder, out, done


def test_the_files_are_full_of_texts() -> None:
    """Some 2,700, and a reader that takes them all finds them: this is a DICOM file."""
    [whole] = [content for name, content, _ in sentinels.whole_and_broken() if name == "whole"]
    assert len(set(re.findall(rb"QZ7PHI\d{5}", whole))) > 2500
    with pytest.warns(UserWarning, match=f"Unknown encoding '{sentinels.MARK}"):  # pydicom's own way of telling a header's text
        ds = pydicom.dcmread(io.BytesIO(whole))
        str(ds.PatientName)
    assert ds.PatientName == ds[0x00100010].value and str(ds.PatientName).startswith(sentinels.MARK) and ds.Rows == 40
    assert ds.OtherPatientIDsSequence[1].ReferencedStudySequence[0].PatientComments.startswith(sentinels.MARK) and ds[0x00091000].value.startswith(sentinels.MARK)


def test_nothing_is_said(session: tuple[Path, Path, subprocess.CompletedProcess[bytes]]) -> None:
    _, _, done = session
    for stream in (done.stdout, done.stderr):
        assert not re.findall(rb"[^\n]*QZ7PHI[^\n]*", stream)[:3]


def test_nothing_is_written(session: tuple[Path, Path, subprocess.CompletedProcess[bytes]]) -> None:
    """Data files, the results of `ask` and `answer`, and the items in report.json of `eval` name the pictures, by the names that they were given."""
    _, out, _ = session
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len([path for path in written if path.suffix in (".safetensors", ".jsonl", ".json")]) > 15
    number = re.compile(rb"QZ7PHI\d{5}")
    for path in written:
        content = path.read_bytes()
        assert not number.search(content), path
        if {"written-whole", "written-broken"} & set(path.parts) and path.name != "report.json":
            assert sentinels.MARK.encode() not in content, path


def test_everything_was_tried(session: tuple[Path, Path, subprocess.CompletedProcess[bytes]]) -> None:
    """Whole files train, answer and talk; broken ones are refused by name of row, and most files take part."""
    folder, _, done = session
    text = done.stdout.decode()
    counts = json.loads(next(line for line in text.splitlines() if line.startswith('{"read"')))
    assert counts["read"] > 60 and counts["refused"] > 100 and counts["read"] + counts["refused"] == 2 * len(list(folder.iterdir()))
    codes = re.findall(r"\$ ([\w-]+)\n(?:(?!\$ )[^\n]*\n)*?exit code (\d)", text)
    assert {verb for verb, code in codes if code == "0"} >= {"sft", "dpo", "generate", "eval", "answer", "chat"}
    assert {verb for verb, code in codes if code != "0"} >= {"sft", "dpo", "generate", "eval", "answer", "ask", "chat"}
    errors = done.stderr.decode()
    assert re.search(r"row 0 \(id r0\): DICOM file [0-9a-f]{8} \(STLLAVA_SHOW_NAMES=1 shows names\): cannot be read: PhotometricInterpretation is none of those", errors)


def test_names_are_shown_when_asked_for(session: tuple[Path, Path, subprocess.CompletedProcess[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    from stllava.images import ImageError, load_image
    folder, _, _ = session
    path = folder / f"{sentinels.MARK}-text-WindowCenter.dcm"
    for value, shown in (("1", True), ("0", False)):
        monkeypatch.setenv("STLLAVA_SHOW_NAMES", value)
        with pytest.raises(ImageError, match="WindowCenter is not a number") as caught:
            load_image(path)
        assert (str(path) in str(caught.value)) == shown
    for missing in ("gone.dcm", "gone.nii.gz"):
        with pytest.raises(ImageError, match="medical file [0-9a-f]{8} .*No such file"):
            load_image(folder / missing)
