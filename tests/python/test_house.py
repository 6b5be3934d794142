"""The rules of the house that no compiler checks: arrows between rooms, one place for each thing, files that the guides name, calls nobody makes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import text_data

from stllava.conversation import conv_templates
from stllava.text.labels import build_sample

ROOT = Path(__file__).resolve().parents[2]
CSRC, BINDING, PYTHON = ROOT / "csrc", ROOT / "stllava_c/src", ROOT / "python/stllava"
CORE = sorted(path for path in CSRC.rglob("*") if path.suffix in {".c", ".h"})
C_FILES = [*CORE, *sorted(BINDING.glob("*.[ch]"))]
OURS = [path for folder in (CSRC, ROOT / "stllava_c", PYTHON, ROOT / "tests", ROOT / "benchmarks") for path in folder.rglob("*")
        if path.suffix in {".c", ".h", ".cu", ".py", ".pyi"}] + [ROOT / "setup.py"]
MAX_LINES = 800
MAX_ARGUMENTS = 8


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(path: Path) -> str:
    """The file without comments and strings."""
    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)


# ---- rooms -----------------------------------------------------------------------------------------------------------------------


def room(path: Path) -> str:
    parts = path.relative_to(CSRC).parts
    return parts[0] if len(parts) > 1 else "stllava.c"


def drawn_arrows() -> dict[str, set[str]]:
    """Room -> the rooms it may include, from the table of csrc/README.md; "model and below" is model and all that model may include."""
    section = (CSRC / "README.md").read_text(encoding="utf-8").split("## Rooms")[1].split("## ")[0]
    rows = {own.rstrip("/"): included for own, included in re.findall(r"^\| `([\w./]+)` \|.*\| ([^|]+) \|$", section, re.MULTILINE)}
    arrows: dict[str, set[str]] = {}
    for own, included in rows.items():
        below = re.fullmatch(r"(\w+) and below", included)
        words = [] if included == "libc" else list(rows) if included == "all" else re.findall(r"\w+", below[1] if below else included)
        arrows[own] = set(words) | (arrows[below[1]] if below else set())
    return arrows


def test_the_table_has_every_room():
    assert set(drawn_arrows()) == {room(path) for path in CORE}
    assert drawn_arrows()["train"] == {"model", "ops", "tensor", "base"}


@pytest.mark.parametrize("path", CORE, ids=name)
def test_includes_follow_the_arrows(path):
    own = room(path)
    for include in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
        assert (CSRC / include).exists(), f'{name(path)} includes "{include}", which is not in csrc'
        target = room(CSRC / include)
        assert target in drawn_arrows()[own] | {own} or include == "stllava.h", f'{name(path)} includes "{include}": {own} may not see {target}'


@pytest.mark.parametrize("path", sorted(BINDING.glob("*.[ch]")), ids=name)
def test_the_binding_sees_only_the_door(path):
    included = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    assert all(include == "stllava.h" or (BINDING / include).exists() for include in included), included


def test_the_core_knows_no_python_and_the_low_level_package_not_the_friendly_one():
    assert not [name(path) for path in CORE if "Python.h" in path.read_text(encoding="utf-8")]
    imports = re.compile(r"^\s*(from|import) stllava\b(?!_c)", re.MULTILINE)
    assert not [name(path) for path in (ROOT / "stllava_c").glob("*.py*") if imports.search(path.read_text(encoding="utf-8"))]


# ---- one place for each thing ----------------------------------------------------------------------------------------------------


def test_file_names_are_unique_and_listed():
    names = [path.name for path in CORE]
    assert len(names) == len(set(names))
    listed = re.findall(r"^(?:once|typed)\s+(\S+)$", (CSRC / "sources.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert {str(path.relative_to(CSRC)) for path in CORE if path.suffix == ".c"} == set(listed)


@pytest.mark.parametrize("path", sorted((CSRC / "ops").glob("*.c")), ids=name)
def test_an_operator_has_its_header_and_its_test(path):
    """X.c, X.h and tests/c/test_X.c; X_variant.c lies beside X.c and is tested by X's test."""
    operator = path.stem
    while not (path.with_name(f"{operator}.c").exists() and (ROOT / f"tests/c/test_{operator}.c").exists()):
        assert "_" in operator, f"{name(path)}: no tests/c/test_{path.stem}.c, and not a variant of an operator that has one"
        operator = operator.rpartition("_")[0]
        if operator == "ops":  # the table of CUDA slots: tests/cuda
            return
    assert path.with_name(f"{operator}.h").exists()


@pytest.mark.parametrize("path", OURS, ids=name)
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", [path for path in C_FILES if path.suffix == ".h"], ids=name)
def test_no_function_has_many_arguments(path):
    """Besides `x`, where it runs; what needs more takes a struct."""
    for function, arguments in re.findall(r"^(?!typedef)[a-z][\w *]*?\b(\w+)\(([^()]*)\)(?: \w+)?;", code(path), re.MULTILINE):
        given = [a for a in re.split(r"\s*,\s*", arguments.strip()) if not re.match(r"(stv_exec|void) \*(x|stream)$", a)]
        assert len(given) <= MAX_ARGUMENTS, f"{function} has {len(given)} arguments"


def test_one_training_loop():
    """SFT and DPO bring a batch and a loss; updates, optimiser and resuming are in one place."""
    def users(pattern: str) -> list[str]:
        return [str(path.relative_to(PYTHON)) for path in sorted(PYTHON.rglob("*.py")) if re.search(pattern, path.read_text(encoding="utf-8"))]

    assert users(r"\badamw_step\(") == ["train/update.py"]
    assert users(r"\bdef train\(") == ["train/loop.py"]
    assert users(r"\(Trainer\):") == ["train/dpo.py", "train/sft.py"]
    assert all(not re.search(r"adamw|zero_grad|grad_norm\(|save_checkpoint", (PYTHON / f"train/{recipe}.py").read_text(encoding="utf-8"))
               for recipe in ("sft", "dpo"))


@pytest.mark.parametrize("path", sorted((CSRC / "model").glob("*.[ch]")), ids=name)
def test_model_files_do_not_ask_what_was_built(path):
    conditions = re.findall(r"^\s*#\s*(?:if|ifdef|ifndef|elif)\b(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert all(re.fullmatch(r" STV_\w+_H", condition) for condition in conditions), conditions


# ---- what CONTRIBUTING.md promises -----------------------------------------------------------------------------------------------

GUIDES = {guide: (ROOT / guide).read_text(encoding="utf-8") for guide in ("CONTRIBUTING.md", "csrc/README.md", "README.md")}
SUFFIXES = r"\.(?:c|h|cu|py|pyi|md|txt|toml|cfg|run)"


@pytest.mark.parametrize("guide", GUIDES)
def test_the_files_a_guide_names_exist(guide):
    """`{a,b}` stands for both, `<kind>` for a name that the reader chooses."""
    missing = []
    for word in re.findall(r"`([^`\s]+)`|(?<=\s)([\w/{},.]+/[\w{},.]+" + SUFFIXES + r")\b", GUIDES[guide]):
        path = word[0] or word[1]
        if not re.search(r"(?:/|" + SUFFIXES + r")$", path) or re.search(r"[<>$*=]|^\.|X|Python\.h", path):
            continue
        braces = re.search(r"\{(.*)\}", path)
        for choice in braces[1].split(",") if braces else [""]:
            one = path.replace(braces[0], choice) if braces else path
            if not any((root / one).exists() for root in (ROOT, CSRC)) and not ("/" not in one and any(CSRC.rglob(one))):
                missing.append(one)
    assert not missing


def test_the_commands_of_the_guide_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`make ([a-z][a-z-]*)", GUIDES["CONTRIBUTING.md"]))
    assert {"install", "test", "bench", "lint"} <= targets
    assert not [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)]


def test_a_loss_is_in_two_files():
    """As CONTRIBUTING.md says: the enumeration and the room of the preference losses; all others take the list from there."""
    names = r'"ipo"|"apo_zero"|"sppo_hard"|STV_LOSS_IPO|STV_LOSS_APO_ZERO'
    files = [*C_FILES, *PYTHON.rglob("*.py"), *(ROOT / "stllava_c").glob("*.py*")]
    assert [name(path) for path in files if re.search(names, path.read_text(encoding="utf-8"))] == ["csrc/stllava.h", "csrc/train/preference.c"]


def test_a_template_is_an_entry_of_one_table(monkeypatch):
    """A new entry renders, encodes and masks; no other module knows a template by its name."""
    new = replace(conv_templates["v1"], name="house", roles=("DOCTOR", "MODEL"), version="house")
    monkeypatch.setitem(conv_templates, "house", new)
    turns = [{"from": "human", "value": "What is shown?"}, {"from": "gpt", "value": "A lung."}]
    sample = build_sample(turns, "house", text_data.tokenizer(), has_image=False)
    assert text_data.tokenizer().decode([label for label in sample.labels if label >= 0]).split("</s>")[0].strip() == "A lung."
    others = [path for path in PYTHON.rglob("*.py") if path.name != "conversation.py" and path.parent.name != "demo"]  # which has one model
    assert not [name(path) for path in others if re.search(r'[!=]= ?"(?:v0|v1|v1_sq|llama_2|mistral_instruct|plain|mpt)"', path.read_text(encoding="utf-8"))]


# ---- calls nobody makes ----------------------------------------------------------------------------------------------------------

UNBOUNDED = r"\b(strcpy|strcat|stpcpy|sprintf|vsprintf|gets|alloca|strtok|atoi|atof|scanf|sscanf|fscanf)\s*\("
ENDS_OR_PRINTS = r"\b(exit|_exit|_Exit|quick_exit|abort|printf|fprintf|vprintf|vfprintf|puts|fputs|putchar|perror|system|getenv)\s*\("
ASKS_THE_ENVIRONMENT = {"csrc/base/cpu.c"}  # STLLAVA_CPU, once


@pytest.mark.parametrize("path", C_FILES, ids=name)
def test_no_unbounded_calls(path):
    assert not re.findall(UNBOUNDED, code(path))


@pytest.mark.parametrize("path", CORE, ids=name)
def test_the_core_is_silent_and_never_ends_the_process(path):
    assert set(re.findall(ENDS_OR_PRINTS, code(path))) <= ({"getenv"} if name(path) in ASKS_THE_ENVIRONMENT else set())


@pytest.mark.parametrize("path", C_FILES, ids=name)
def test_an_allocation_is_one_count_times_one_size(path):
    """`n * sizeof x`, where n things are in memory already or n was checked; a product of counts goes through stv_size_mul."""
    for call in re.findall(r"\b(?:stv_alloc(?:_zero)?|(?:PyMem_(?:Raw)?)?(?:M|m)alloc)\(([^;]*?)\);", code(path)):
        counted = re.sub(r"sizeof(?:\s*\*+\s*[\w>.-]+|\s*\([^()]*\)|\s+\w+)|\(size_t\)|\b\d+ \* ", "1", call)
        assert len(re.findall(r"[\w)\]]\s*\*\s*[\w(]", counted)) <= 1, call
