"""Splits never share an image or a patient, stay where they are when records are added, and samples and merging lose nothing."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, strategies as st

from stllava.data.formats import images_of
from stllava.data.select import merge_records, patient_by_field, patient_by_name, sample_records, split_records
from stllava.errors import FormatError

IMAGES = st.one_of(st.none(), st.integers(0, 12).map(lambda i: f"{i}.png"), st.integers(0, 12).map(lambda i: f"./a/../{i}.png"),
                   st.integers(0, 3).map(lambda i: {"bytes": bytes([i]), "path": None}), st.lists(st.integers(0, 12).map(lambda i: f"{i}.png"), max_size=3))
RECORDS = st.lists(st.fixed_dictionaries({"image": IMAGES, "patient": st.integers(0, 6)}, optional={"id": st.integers(0, 40)}), max_size=40)
SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}


def pictures(record: dict) -> set[str]:
    return {image.rsplit("/", 1)[-1] if isinstance(image, str) else repr(image) for image in images_of(record)}


def disjoint(parts: dict[str, list[dict]], key) -> bool:
    where: dict[object, str] = {}
    return all(where.setdefault(one, name) == name for name, records in parts.items() for record in records for one in key(record))


@given(RECORDS, st.integers(0, 5), st.booleans())
def test_parts_share_no_image_and_no_patient(records: list[dict], seed: int, by_share: bool) -> None:
    how = {"fractions": SHARES} if by_share else {"counts": {"test": len(records) // 3}}
    for by, patient_of in (("image", None), ("patient", patient_by_field("patient")), ("sample", None)):
        parts = split_records(records, **how, by=by, patient_of=patient_of, seed=seed)
        assert Counter(id(record) for part in parts.values() for record in part) == Counter(map(id, records))  # each exactly once
        if by != "sample":
            assert disjoint(parts, pictures)
        if by == "patient":
            assert disjoint(parts, lambda record: {record["patient"]})
        if not by_share:
            assert len(parts["test"]) <= len(records) // 3
        assert parts == split_records(records, **how, by=by, patient_of=patient_of, seed=seed)


@given(RECORDS, RECORDS, st.randoms())
def test_more_records_leave_the_old_ones_where_they_are(old: list[dict], new: list[dict], random) -> None:
    """By sample, and by image where no record ties two images together; in any order."""
    old, new = ([{**record, "image": None if isinstance(record["image"], list) else record["image"], "n": n} for n, record in enumerate(records, start)]
                for records, start in ((old, 0), (new, 1000)))
    both = [*old, *new]
    random.shuffle(both)
    for by in ("sample", "image"):
        before = {record["n"]: name for name, records in split_records(old, SHARES, by=by).items() for record in records}
        after = {record["n"]: name for name, records in split_records(both, SHARES, by=by).items() for record in records}
        assert before == {n: after[n] for n in before}


def test_sizes_are_near_the_shares() -> None:
    records = [{"id": i, "image": f"{i}.png"} for i in range(10_000)]
    sizes = {name: len(part) for name, part in split_records(records, SHARES, seed=1).items()}
    assert all(abs(sizes[name] - share * 10_000) < 4 * 50 for name, share in SHARES.items())  # four standard deviations of a binomial, at most 50
    assert [len(split_records(records, {"train": 1.0, "test": 0.0})[name]) for name in ("train", "test")] == [10_000, 0]
    exact = split_records(records, counts={"validation": 123, "test": 1000}, by="image")
    assert {name: len(part) for name, part in exact.items()} == {"train": 8877, "validation": 123, "test": 1000}


def test_chains_of_images_stay_together() -> None:
    records = [{"image": [f"{i}.png", f"{i + 1}.png"]} for i in range(50)]
    assert sorted(map(len, split_records(records, SHARES).values())) == [0, 0, 50]


def test_patients() -> None:
    of = patient_by_name(r"/(p\d+)_")
    assert of({"image": "x/p12_1.png"}) == "p12" and of({"image": "y.png"}) is None and of({}) is None and of({"image": {"bytes": b"x"}}) is None
    assert patient_by_name(r"p\d+")({"image": ["p3.png", "p4.png"]}) == "p3"
    assert patient_by_field("study")({"study": 3}) == "3" and patient_by_field("study")({"study": " "}) is None and patient_by_field("study")({"study": True}) is None
    with pytest.raises(FormatError, match=r"1 of 2 records have no patient, rows 1 \(id b\)"):
        split_records([{"id": "a", "p": 1}, {"id": "b"}], SHARES, by="patient", patient_of=patient_by_field("p"))
    with pytest.raises(ValueError, match="needs to know the patient"):
        split_records([{"id": "a"}], SHARES, by="patient")


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc")), max_size=60), st.floats(0, 1), st.integers(0, 3))
def test_samples(rows: list[tuple[int, str]], fraction: float, seed: int) -> None:
    records = [{"id": i, "kind": kind} for i, kind in rows]
    some = sample_records(records, fraction=fraction, seed=seed)
    n = round(fraction * len(records))
    assert len(some) == n and some == sample_records(records, n, seed=seed)
    places = [next(i for i, record in enumerate(records) if record is one) for one in some]
    assert places == sorted(set(places))  # without repetition, in order
    larger = sample_records(records, min(n + 1, len(records)), seed=seed)
    assert all(any(one is other for other in larger) for one in some)
    if records:
        by_kind = Counter(record["kind"] for record in sample_records(records, n, stratify="kind", seed=seed))
        assert sum(by_kind.values()) == n
        assert all(abs(by_kind[kind] - n * size / len(records)) < 1 for kind, size in Counter(record["kind"] for record in records).items())


@given(st.lists(st.lists(st.one_of(st.none(), st.integers(0, 5), st.integers(0, 5).map(str), st.sampled_from(["1-2", "1-3"])), max_size=12), min_size=1, max_size=3))
def test_merging_gives_every_record_an_id_of_its_own(ids: list[list[object]]) -> None:
    sets = [(f"set{n}", [{**({} if name is None else {"id": name}), "n": (n, row)} for row, name in enumerate(names)]) for n, names in enumerate(ids)]
    total = sum(map(len, ids))
    merged, n_twice = merge_records(sets, on_duplicate="rename")
    assert [record["n"] for record in merged] == [record["n"] for _, records in sets for record in records]
    names = [str(record["id"]) for record in merged if "id" in record]
    assert len(names) == len(set(names))
    kept, _ = merge_records(sets, on_duplicate="skip")
    assert len(kept) == total - n_twice
    if n_twice:
        with pytest.raises(FormatError, match="ids stand twice"):
            merge_records(sets)
    else:
        assert merge_records(sets) == (merged, 0) and merged == kept == [record for _, records in sets for record in records]


def test_many_records_of_one_id() -> None:
    merged, n = merge_records([("a", [{"id": "x"}] * 20_000)], on_duplicate="rename")
    assert n == 19_999 and merged[-1]["id"] == "x-20000"


def test_prefixes() -> None:
    records = [{"id": 1, "image": "a.png"}, {"id": 2, "images": ["a.png", "b.png"]}, {"id": 3}, {"id": 4, "image": {"bytes": b"x", "path": None}}]
    merged, _ = merge_records([("a", records)], prefixes=["rad/imgs"])
    assert [images_of(record) for record in merged] == [["rad/imgs/a.png"], ["rad/imgs/a.png", "rad/imgs/b.png"], [], [{"bytes": b"x", "path": None}]]
    assert records[0] == {"id": 1, "image": "a.png"}  # the caller's records are not changed
