"""The stub says what the runtime has: names, kinds, parameters, defaults, in both directions."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import stllava_c
from stllava_c import _core

STUB = ast.parse((Path(stllava_c.__file__).parent / "_core.pyi").read_text(encoding="utf-8"))
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
CONSTANTS = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
OWN = {"TensorInfo", "Error", "NumericError"}  # a struct sequence and two exceptions: their methods are Python's


def parameters_of_stub(node: ast.FunctionDef) -> list[tuple[str, str, object]]:
    """(name, kind, default) without self and cls."""
    a = node.args
    assert not a.posonlyargs, node.name  # every parameter of ours can be named
    defaults = [inspect.Parameter.empty] * (len(a.args) - len(a.defaults)) + [ast.literal_eval(d) for d in a.defaults]
    rows = [(arg.arg, "plain", default) for arg, default in zip(a.args, defaults, strict=True)]
    rows += [(arg.arg, "keyword", inspect.Parameter.empty if d is None else ast.literal_eval(d)) for arg, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return [row for row in rows if row[0] not in ("self", "cls")]


def parameters_of_runtime(function: object) -> list[tuple[str, str, object]]:
    kinds = {inspect.Parameter.KEYWORD_ONLY: "keyword", inspect.Parameter.POSITIONAL_OR_KEYWORD: "plain"}
    return [(p.name, kinds.get(p.kind, p.kind), p.default) for p in inspect.signature(function).parameters.values() if p.name not in ("self", "type")]


def test_names():
    runtime = {name for name in dir(_core) if not name.startswith("__")}
    assert runtime == set(FUNCTIONS) | set(CLASSES) | CONSTANTS
    assert {name for name in runtime if not name.startswith("_")} == set(stllava_c.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    assert parameters_of_stub(FUNCTIONS[name]) == parameters_of_runtime(getattr(_core, name))


@pytest.mark.parametrize("name", sorted(set(CLASSES) - OWN))
def test_class(name):
    cls, nodes = getattr(_core, name), {n.name: n for n in CLASSES[name].body if isinstance(n, ast.FunctionDef)}
    public = {attribute for attribute in vars(cls) if not attribute.startswith("_")}
    assert public == set(nodes) - {"__init__"}
    if "__init__" in nodes:
        assert parameters_of_stub(nodes["__init__"]) == parameters_of_runtime(cls)
    for attribute in public:
        kind = type(vars(cls)[attribute]).__name__
        decorators = {d.id for d in nodes[attribute].decorator_list if isinstance(d, ast.Name)}
        assert decorators == {"getset_descriptor": {"property"}, "classmethod_descriptor": {"classmethod"}}.get(kind, set()), attribute
        if kind != "getset_descriptor":
            assert parameters_of_stub(nodes[attribute]) == parameters_of_runtime(getattr(cls, attribute)), attribute


def test_tensor_info_fields():
    fields = [n.target.id for n in CLASSES["TensorInfo"].body if isinstance(n, ast.AnnAssign)]
    assert list(_core.TensorInfo.__match_args__) == fields


def test_exceptions():
    assert issubclass(_core.NumericError, _core.Error) and issubclass(_core.NumericError, ArithmeticError) and isinstance(_core.Error.code, str)
