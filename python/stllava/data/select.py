"""Parts of data sets: splits that share no image or patient, samples, and several sets as one.

Which part a record comes into depends on a seed and on the record's own key (its image, its patient, its id), never on its row: a file with more
records gives every old one the same part, unless a new record ties two groups together.
"""

from __future__ import annotations

import functools
import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from stllava.errors import FormatError
from stllava.image_source import split_choice

from .formats.load import next_name
from .formats.messages import images_of
from .formats.write import map_images

__all__ = ["By", "merge_records", "patient_by_field", "patient_by_name", "sample_records", "split_records"]

By = Literal["sample", "image", "patient"]
Record = dict[str, Any]
PatientOf = Callable[[Mapping[str, Any]], str | None]
"""The patient of a record; None: it does not say."""
K = TypeVar("K", bound=Hashable)


def _draw(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}\x1f{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def sample_key(record: Mapping[str, Any]) -> str:
    """The record's id, else a digest of what it holds."""
    for field in ("id", "question_id"):
        if isinstance(record.get(field), (str, int)):
            return f"id {record[field]}"
    text = json.dumps(record, sort_keys=True, default=lambda value: value.hex() if isinstance(value, bytes) else str(value))
    return "record " + hashlib.sha256(text.encode()).hexdigest()


def image_keys(record: Mapping[str, Any]) -> list[str]:
    """The files that a record shows, one spelling for each, slices of a volume as one; images inside it by a digest."""
    def key(image: Any) -> str:
        if isinstance(image, str):
            return f"image {posixpath.normpath(split_choice(image)[0])}"
        data = image.get("bytes") if isinstance(image, Mapping) else None
        return "image " + hashlib.sha256(data if isinstance(data, bytes) else str(image).encode()).hexdigest()

    return [key(image) for image in images_of(record)]


def patient_by_field(field: str) -> PatientOf:
    """The patient stands in a field, as text or a number."""
    def patient(record: Mapping[str, Any]) -> str | None:
        value = record.get(field)
        return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip() else None
    return patient


def patient_by_name(pattern: str) -> PatientOf:
    """The patient is what a regular expression finds in the name of the first image: its first group, or all it matches. Raises ValueError."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error

    def patient(record: Mapping[str, Any]) -> str | None:
        images = images_of(record)
        found = compiled.search(images[0]) if images and isinstance(images[0], str) else None
        return None if found is None else found[1] if compiled.groups else found[0]
    return patient


# ---- splits ------------------------------------------------------------------------------------------------------------------


def split_records(records: Sequence[Record], fractions: Mapping[str, float] | None = None, *, counts: Mapping[str, int] | None = None,
                  rest: str = "train", by: By = "image", patient_of: PatientOf | None = None, seed: int = 0) -> dict[str, list[Record]]:
    """Parts of `records`, each in its old order; together they are all of them.

    Args:
        fractions: part -> its share, in sum 1. Groups are drawn one by one, so that sizes come out near the shares, and stay where they are when
            records are added. counts: part -> number of records; groups are taken whole, so it may get a few less. All others go to the part `rest`.
        by: what must not be in two parts: a record (its id), an image (records without one count as a group each), or a patient, and then none of his
            images either. Records that share an image or patient with a third record are in its part too.
        patient_of: for `by="patient"`, the patient of a record or None.

    Raises:
        ValueError: fractions that are not in sum 1, counts that are more than there is. FormatError: records without a patient, listed.
    """
    if (fractions is None) == (counts is None):
        raise ValueError("want either fractions or numbers of records")
    groups = _groups(_keys(records, by, patient_of))
    if fractions is not None:
        if not fractions or any(not 0 <= share <= 1 for share in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
            raise ValueError(f"fractions {dict(fractions)} add up to {sum(fractions.values()):g}, want numbers from 0 to 1 that add up to 1")
        part_of = {key: _by_share(_draw(seed, key), fractions) for key in set(groups)}
        names = list(fractions)
    else:
        assert counts is not None
        part_of, names = _by_count(groups, counts, rest, seed), [*([rest] if rest not in counts else []), *counts]
    parts: dict[str, list[Record]] = {name: [] for name in names}
    for record, group in zip(records, groups, strict=True):
        parts[part_of[group]].append(record)
    return parts


def _keys(records: Sequence[Record], by: By, patient_of: PatientOf | None) -> list[list[str]]:
    if by == "sample":
        return [[sample_key(record)] for record in records]
    if by == "image":
        return [image_keys(record) or [sample_key(record)] for record in records]
    if patient_of is None:
        raise ValueError("a split by patient needs to know the patient of a record: a field, or a regular expression for the image's name")
    patients = [patient_of(record) for record in records]
    missing = [row for row, patient in enumerate(patients) if patient is None]
    if missing:
        shown = ", ".join(f"{row} ({sample_key(records[row])[:60]})" for row in missing[:10])
        raise FormatError(f"{len(missing)} of {len(records)} records have no patient, rows {shown}{', ...' if len(missing) > 10 else ''}; "
                          "without one they could be of a patient of another part")
    return [[f"patient {patient}", *image_keys(record)] for patient, record in zip(patients, records, strict=True)]


def _groups(keys: Sequence[Sequence[str]]) -> list[str]:
    """The group of each record, named by the least of its keys: records that share a key, directly or through others, are of one group."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for own in keys:
        first = root(own[0])
        for key in own[1:]:
            other = root(key)
            first, last = min(first, other), max(first, other)
            parent[last] = first
    return [root(own[0]) for own in keys]


def _by_share(draw: float, fractions: Mapping[str, float]) -> str:
    total, chosen = 0.0, ""
    for name, share in fractions.items():
        if share > 0:
            total, chosen = total + share, name
            if draw < total:
                break
    return chosen


def _by_count(groups: Sequence[str], counts: Mapping[str, int], rest: str, seed: int) -> dict[str, str]:
    if any(n < 0 for n in counts.values()) or sum(counts.values()) > len(groups):
        raise ValueError(f"{dict(counts)} are more than the {len(groups)} records there are, or less than none")
    sizes = Counter(groups)
    left = dict(counts)
    part_of = {}
    for key in sorted(sizes, key=lambda key: (_draw(seed, key), key)):
        part_of[key] = next((name for name, n in left.items() if name != rest and sizes[key] <= n), rest)
        if part_of[key] != rest:
            left[part_of[key]] -= sizes[key]
    return part_of


# ---- samples -----------------------------------------------------------------------------------------------------------------


def sample_records(records: Sequence[Record], n: int | None = None, fraction: float | None = None, *, stratify: str | None = None,
                   seed: int = 0) -> list[Record]:
    """`n` records, or a share of them, drawn without repetition, in their old order.

    stratify: a field; each of its values keeps its share, to within a record. A record that was in a sample is in every larger one of the same seed
    (without `stratify`).

    Raises:
        ValueError: more than there is, a share outside [0, 1], neither or both of `n` and `fraction`, or a field that no record has.
    """
    if (n is None) == (fraction is None):
        raise ValueError("want either a number of records or a fraction")
    if n is None:
        assert fraction is not None
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction {fraction:g}, want a number from 0 to 1")
        n = round(fraction * len(records))
    if not 0 <= n <= len(records):
        raise ValueError(f"{n} of {len(records)} records cannot be drawn")
    if stratify is not None and not any(stratify in record for record in records):
        raise ValueError(f"no record has the field {stratify!r}; found {', '.join(sorted({key for record in records[:100] for key in record}))}")
    strata: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        strata.setdefault("" if stratify is None else json.dumps(record.get(stratify), sort_keys=True, default=str), []).append(row)
    seen: Counter[str] = Counter()
    draws = []
    for record in records:
        key = sample_key(record)
        draws.append(_draw(seed, f"{key}\x1f{seen[key]}"))
        seen[key] += 1
    taken = {row for name, share in _shares({name: len(rows) for name, rows in strata.items()}, n).items()
             for row in sorted(strata[name], key=lambda row: draws[row])[:share]}
    return [record for row, record in enumerate(records) if row in taken]


def _shares(sizes: Mapping[K, int], n: int) -> dict[K, int]:
    """`n` shared in proportion, the largest remainders rounded up."""
    total = sum(sizes.values())
    exact = {name: n * size / total if total else 0.0 for name, size in sizes.items()}
    shares = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: (shares[name] - exact[name], str(name)))[:n - sum(shares.values())]:
        shares[name] += 1
    return shares


# ---- merging -----------------------------------------------------------------------------------------------------------------


def merge_records(sets: Sequence[tuple[str, Sequence[Record]]], *, on_duplicate: Literal["error", "rename", "skip"] = "error",
                  prefixes: Sequence[str] | None = None) -> tuple[list[Record], int]:
    """The records of several sets, one after the other, and how many ids stood twice.

    Args:
        sets: (name, records). on_duplicate: of a record whose id an earlier one has, "rename" makes ID-2, ID-3, ..., "skip" leaves it out. Ids count
            as text: 12 and "12" are the same to whoever joins answers by them. prefixes: a folder for each set, put before the names of its images.

    Raises:
        FormatError: with "error", naming the ids and the sets. ValueError: not one prefix for each set.
    """
    if on_duplicate not in ("error", "rename", "skip"):
        raise ValueError(f"on_duplicate is {on_duplicate!r}, want error, rename or skip")
    if prefixes is not None and len(prefixes) != len(sets):
        raise ValueError(f"{len(prefixes)} prefixes for {len(sets)} sets, want one for each ('' for none)")
    names = {str(record[field]) for _, records in sets for record in records if (field := _id_field(record))}
    first: dict[str, str] = {}
    merged: list[Record] = []
    again: list[tuple[str, str, str]] = []
    last: dict[str, int] = {}
    for (source, records), prefix in zip(sets, prefixes or [""] * len(sets), strict=True):
        for record in records:
            field = _id_field(record)
            name = str(record[field]) if field else ""
            record = map_images(record, functools.partial(_prefixed, prefix)) if prefix else record
            if field and name in first:
                again.append((name, first[name], source))
                if on_duplicate == "skip":
                    continue
                record = {**record, field: next_name(name, names, last)}
            elif field:
                first[name] = source
            merged.append(record)
    if again and on_duplicate == "error":
        shown = "; ".join(f"{name!r} in {one} and {other}" for name, one, other in again[:10])
        raise FormatError(f"{len(again)} ids stand twice: {shown}{'; ...' if len(again) > 10 else ''}; --on_duplicate rename or skip")
    return merged, len(again)


def _prefixed(prefix: str, image: Any) -> Any:
    return posixpath.join(prefix, image) if isinstance(image, str) else image


def _id_field(record: Mapping[str, Any]) -> str | None:
    return next((field for field in ("id", "question_id") if isinstance(record.get(field), (str, int))), None)
