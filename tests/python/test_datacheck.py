"""The data check: what was planted is found, nothing else is; every kind of the table has its case."""

from __future__ import annotations

import pytest
import text_data
from planted import PAIR_PLANTS, PLANTS, plant

from stllava.datacheck import CheckSettings, check_data
from stllava.datacheck.pictures import PictureRules

DEEP = CheckSettings(pictures=PictureRules(deep=True, prints=True))


def found(report) -> set[tuple[int | None, str]]:
    return {(finding.row, finding.kind) for finding in report.findings}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    wanted = plant(folder)
    return folder, wanted


def check(folder, name, settings=DEEP, **options):
    return check_data(folder / f"{name}.json", folder / "images", tokenizer=text_data.tokenizer(), tokens_per_image=576, settings=settings, **options)


def test_what_was_planted_is_found_exactly(planted):
    folder, (wanted, wanted_pairs) = planted
    report = check(folder, "sft", against=[folder / "test.json"])
    assert found(report) - wanted == {(None, "text_only")} and wanted - found(report) == set()
    assert found(check(folder, "dpo")) == wanted_pairs
    kinds = {kind for kind, *_ in (*PLANTS, *PAIR_PLANTS)}
    assert len(PLANTS) + len(PAIR_PLANTS) >= 60 and len(kinds) >= 20 and len(report.findings) == len(wanted) + 1


def test_the_clean_twin_has_no_finding(tmp_path):
    plant(tmp_path, spoil=False)
    for name in ("sft", "dpo", "test"):
        report = check(tmp_path, name, against=[tmp_path / "test.json"] if name == "sft" else ())
        assert report.findings == [] and len(report.records) > 3
