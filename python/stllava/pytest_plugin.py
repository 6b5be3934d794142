"""pytest plugin: a threshold on a metric is an ordinary test.

    @pytest.mark.vqa(model="out/merged", data="test.json", image_folder="images", metric="closed accuracy", at_least=0.8)
    def test_closed(): ...

    def test_more(vqa_report): ...                  # the evaluation that the test's marker describes
    def test_model(stllava_model): ...              # stllava_model("out/merged"), loaded once a session

Paths start at pytest's root directory. Fields are those of `stllava.evaluate.thresholds.Vqa`; what markers without a metric say (of a class, or in
`pytestmark`) holds for those with one, so a module names its model and data once. A model answers a data set once, whatever the number of metrics;
its answers stay in pytest's cache under a digest of all they depend on, or with `--vqa-answers DIR` there.

Every pytest run loads this file where stllava is installed, so it imports nothing before a test asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from stllava.evaluate.report import VqaReport
    from stllava.evaluate.thresholds import Evaluations, Vqa
    from stllava.model import LlavaModel

MARKER = "vqa(model, data, metric, at_least, image_folder, ...): answers of the model to the data reach this value of this metric (stllava)"
_EVALUATIONS = pytest.StashKey["Evaluations"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("stllava").addoption("--vqa-answers", metavar="DIR", help="where the answers of vqa tests are kept; default: pytest's cache")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


@pytest.fixture(scope="session")
def stllava_model(pytestconfig: pytest.Config) -> Callable[..., LlavaModel]:
    """``stllava_model(path, model_base=None, **options)``: `LlavaModel.from_pretrained`. All tests get the same model, so they must not change it."""
    def load(path: str | os.PathLike[str], model_base: str | os.PathLike[str] | None = None, **options: Any) -> LlavaModel:
        root = pytestconfig.rootpath
        return _evaluations(pytestconfig).model(root / path, None if model_base is None else root / model_base, **options)

    return load


@pytest.fixture
def vqa_report(request: pytest.FixtureRequest) -> VqaReport:
    """`stllava.evaluate.VqaReport` of the test's `vqa` marker, the innermost if there are several."""
    found = _wanted(request.node)
    if not found:
        pytest.fail(f"{request.node.nodeid}: vqa_report needs to know whose: @pytest.mark.vqa(model=\"DIR\", data=\"FILE\")", pytrace=False)
    with _clear_errors(request.node):
        return _evaluations(request.config).report(found[0])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A marker that is wrong ends its test before anything is loaded."""
    _wanted(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """All thresholds first, then what the test itself asserts."""
    thresholds = [vqa for vqa in _wanted(item) if vqa.metric is not None]
    with _clear_errors(item):
        missed = [text for vqa in thresholds if (text := _evaluations(item.config).missed(vqa)) is not None]
    if missed:
        pytest.fail("\n\n".join(missed), pytrace=False)


def _wanted(item: pytest.Item) -> list[Vqa]:
    """What the markers of a test ask for, the innermost first."""
    markers = list(item.iter_markers("vqa"))
    if not markers:
        return []
    from stllava.evaluate.thresholds import read_markers
    with _clear_errors(item):
        return read_markers([(marker.args, marker.kwargs) for marker in markers], item.config.rootpath)


@contextmanager
def _clear_errors(item: pytest.Item) -> Iterator[None]:
    """What is wrong with a marker, a model or data, in a line that names the test; a traceback would lead into this package."""
    try:
        yield
    except (ValueError, OSError) as error:  # StllavaErrors of files and settings are ValueErrors
        raise pytest.fail.Exception(f"{item.nodeid}: {error}", pytrace=False) from None


def _evaluations(config: pytest.Config) -> Evaluations:
    if _EVALUATIONS not in config.stash:
        from stllava.evaluate.thresholds import Evaluations
        given = config.getoption("--vqa-answers")
        config.stash[_EVALUATIONS] = Evaluations(_kept(config) if given is None else config.invocation_params.dir / given)
    return config.stash[_EVALUATIONS]


def _kept(config: pytest.Config) -> Path:
    """A folder for answers: in pytest's cache, or for this run if it has none (``-p no:cacheprovider``)."""
    cache: pytest.Cache | None = getattr(config, "cache", None)
    if cache is not None:
        return cache.mkdir("stllava-vqa")
    import tempfile
    folder = tempfile.TemporaryDirectory(prefix="stllava-vqa-")
    config.add_cleanup(folder.cleanup)
    return Path(folder.name)
