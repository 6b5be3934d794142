"""No pickle is ever run: every opcode and every name outside the whitelist is refused by name, in a torch file as in a data set's."""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from pathlib import Path

import pytest

from stllava.checkpoint import torch_pickle, torch_zip
from stllava.data.benchmarks import load_benchmark
from stllava.data.formats import plain_pickle
from stllava.data.records import read_records
from stllava.errors import FormatError

ALLOWED_OPCODES = {"PROTO", "EMPTY_DICT", "MARK", "EMPTY_TUPLE", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE",
                   "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "GLOBAL", "BINPERSID", "REDUCE", "BUILD", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT",
                   "BINGET", "LONG_BINGET", "STOP"}
ARGUMENTS = {"INT": b"1\n", "LONG": b"1L\n", "LONG4": b"\1\0\0\0\1", "STRING": b"'a'\n", "BINSTRING": b"\1\0\0\0a", "SHORT_BINSTRING": b"\1a",
             "BINBYTES": b"\1\0\0\0a", "SHORT_BINBYTES": b"\1a", "BINBYTES8": b"\1" + bytes(7) + b"a", "BYTEARRAY8": b"\1" + bytes(7) + b"a",
             "UNICODE": b"a\n", "SHORT_BINUNICODE": b"\1a", "BINUNICODE8": b"\1" + bytes(7) + b"a", "FLOAT": b"1.5\n", "BINFLOAT": bytes(8),
             "GET": b"0\n", "PUT": b"0\n", "EXT1": b"\1", "EXT2": b"\1\0", "EXT4": b"\1\0\0\0", "INST": b"os\nsystem\n", "FRAME": bytes(8),
             "PERSID": b"a\n"}
REFUSED_OPCODES = [opcode for opcode in pickletools.opcodes if opcode.name not in ALLOWED_OPCODES]

NAMES = """
os system|posix system|nt system|os popen|os execv|os fork|os remove|os unlink|os rename|os mkdir|os chmod|os putenv|os open|os kill
subprocess Popen|subprocess run|subprocess call|subprocess check_output|subprocess getoutput|pty spawn|commands getoutput
builtins eval|builtins exec|builtins compile|builtins open|builtins getattr|builtins setattr|builtins __import__|builtins globals|builtins map
builtins input|builtins breakpoint|builtins bytearray|builtins set|builtins dict|builtins object|builtins type|builtins print|__builtin__ eval
__builtin__ file|__builtin__ set|__main__ x|sys exit|sys modules|sys settrace|importlib import_module|importlib reload|runpy run_path
runpy _run_code|code InteractiveInterpreter|codeop compile_command|marshal loads|pickle loads|pickle load|_pickle loads|dill loads|cloudpickle loads
joblib load|shelve open|timeit timeit|cProfile run|profile run|pdb run|bdb Bdb|trace Trace|doctest debug_script|ctypes CDLL|ctypes cast|mmap mmap
socket socket|socket create_connection|http.client HTTPConnection|urllib.request urlopen|urllib.request urlretrieve|webbrowser open|ftplib FTP|smtplib SMTP
shutil rmtree|shutil copy|pathlib Path|tempfile mktemp|glob glob|zipfile ZipFile|tarfile open|sqlite3 connect|asyncio run|threading Thread
multiprocessing Process|signal signal|atexit register|operator attrgetter|operator methodcaller|operator itemgetter|functools partial|functools reduce
types FunctionType|types CodeType|inspect getsource|_io FileIO|io open|io open_code|copyreg _reconstructor|copyreg __newobj__|copy_reg _reconstructor
collections Counter|collections defaultdict|collections deque|collections OrderedDict.fromkeys|collections namedtuple|collections.abc Mapping
numpy ndarray|numpy dtype|numpy load|numpy fromfile|numpy frombuffer|numpy.core.multiarray _reconstruct|numpy._core.multiarray _reconstruct
numpy.core.multiarray scalar|numpy.testing._private.utils runstring|numpy.f2py.crackfortran getlincoef|numpy.distutils.exec_command exec_command
torch load|torch save|torch tensor|torch Tensor|torch Size|torch device|torch float32|torch UntypedStorage|torch storage|torch FloatTensor|torch QUInt8Storage
torch.hub load|torch.jit load|torch.ops load_library|torch._utils _rebuild_tensor|torch._utils _rebuild_parameter|torch._utils _rebuild_sparse_tensor
torch._utils _rebuild_qtensor|torch._utils _rebuild_tensor_v3|torch._utils _rebuild_wrapper_subclass|torch._utils _rebuild_meta_tensor_no_storage
torch._utils _rebuild_device_tensor_from_numpy|torch._tensor _rebuild_from_type_v2|torch.nn.parameter Parameter|torch.nn Module|torch.storage _load_from_bytes
torch.storage TypedStorage|torch.utils.cpp_extension load|torch.serialization load|torch.distributed.rpc rpc_sync|torch.fx.graph_module reduce_graph_module
transformers AutoModel|transformers.training_args TrainingArguments|peft LoraConfig|stllava.model LlavaModel|stllava_c Model|PIL.Image open
torch  FloatStorage|torch FloatStorage.__class__|torch._utils _rebuild_tensor_v2.__globals__|Collections OrderedDict|collections ordereddict| |. .|.. os|torch floatstorage
"""
GLOBALS = [name for line in NAMES.strip("\n").splitlines() for name in line.split("|")]


def torch_file(folder: Path, code: bytes) -> Path:
    with zipfile.ZipFile(folder / "x.bin", "w") as archive:
        archive.writestr("m/data.pkl", code)
        archive.writestr("m/data/0", bytes(16))
    return folder / "x.bin"


def test_the_whitelist_is_what_is_implemented() -> None:
    codes = {opcode.code.encode("latin-1") for opcode in pickletools.opcodes if opcode.name in ALLOWED_OPCODES}
    assert codes == set(torch_pickle._OPCODES) | {b"."}
    assert len(pickletools.opcodes) == 68 and len(REFUSED_OPCODES) == 68 - len(ALLOWED_OPCODES)


@pytest.mark.parametrize("opcode", REFUSED_OPCODES, ids=lambda opcode: opcode.name)
def test_opcode_is_refused_by_name(tmp_path: Path, opcode: pickletools.OpcodeInfo) -> None:
    code = opcode.code.encode("latin-1")
    for stack in (b"", b"}", b")", b"(K\1K\1", b"}X\1\0\0\0aN"):
        with pytest.raises(FormatError, match=r"data\.pkl, byte \d+: opcode .* is not allowed") as error:
            torch_zip.load(torch_file(tmp_path, b"\x80\x02" + stack + code + ARGUMENTS.get(opcode.name, b"") + b"."))
        assert repr(code) in str(error.value)


@pytest.mark.parametrize("version", [*range(2), *range(3, 6), 255])
def test_other_protocols_are_refused(tmp_path: Path, version: int) -> None:
    with pytest.raises(FormatError, match=f"protocol {version}, want 2"):
        torch_zip.load(torch_file(tmp_path, b"\x80" + bytes([version]) + b"}."))


def test_globals_are_refused_by_name(tmp_path: Path) -> None:
    """Each one alone and as a value of a dictionary, called with a shell command that would leave a file."""
    assert len(set(GLOBALS)) >= 150
    sentinel = tmp_path / "ran"
    argument = f"touch {sentinel}".encode()
    for name in GLOBALS:
        module, _, attribute = name.partition(" ")
        call = b"c%s\n%s\nX%s%s\x85R." % (module.encode(), attribute.encode(), len(argument).to_bytes(4, "little"), argument)
        for code in (b"\x80\x02" + call, b"\x80\x02}X\1\0\0\0a" + call[:-1] + b"s."):
            with pytest.raises(FormatError, match="is not allowed") as error:
                torch_zip.load(torch_file(tmp_path, code))
            assert repr(name) in str(error.value)
    assert not sentinel.exists()


class Calls:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        import os
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"w": x}, lambda x: {"w": [x]}, lambda x: ({}, x)], ids=["bare", "value", "list", "tuple"])
def test_real_pickles_with_a_call_create_nothing(tmp_path: Path, protocol: int, wrap) -> None:
    code = pickle.dumps(wrap(Calls(tmp_path / "ran")), protocol)
    with pytest.raises(FormatError):
        torch_zip.load(torch_file(tmp_path, code))
    (tmp_path / "bare.bin").write_bytes(code)
    with pytest.raises(FormatError, match="never run"):
        torch_zip.load(tmp_path / "bare.bin")
    assert not (tmp_path / "ran").exists()


# ---- PathVQA's tables: lists, dictionaries, text and numbers, and nothing that has a name or is called ---------------------------------------

CALLING = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
UNUSED = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "EMPTY_SET", "ADDITEMS", "FROZENSET", "POP", "POP_MARK", "DUP"}


def data_file(folder: Path, code: bytes) -> Path:
    (folder / "test_vqa.pkl").write_bytes(code)
    return folder / "test_vqa.pkl"


def test_the_opcodes_of_plain_values_are_what_is_implemented() -> None:
    codes = {opcode.name: opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
    assert codes.keys() >= CALLING | UNUSED
    allowed = {code for name, code in codes.items() if name not in CALLING | UNUSED}
    implemented = set(plain_pickle._OPCODES) | {b"."}
    assert implemented == allowed


@pytest.mark.parametrize("opcode", [opcode for opcode in pickletools.opcodes if opcode.name in CALLING | UNUSED], ids=lambda opcode: opcode.name)
def test_opcode_is_refused_in_a_data_set(tmp_path: Path, opcode: pickletools.OpcodeInfo) -> None:
    code = opcode.code.encode("latin-1")
    for stack in (b"]", b"](K\1", b"]}X\1\0\0\0aN", b"])K\1\x85"):
        with pytest.raises(FormatError, match=r"byte \d+: opcode .* is not allowed.*never run") as error:
            read_records(data_file(tmp_path, b"\x80\x02" + stack + code + ARGUMENTS.get(opcode.name, b"") + b"."))
        assert repr(code) in str(error.value)


@pytest.mark.parametrize("protocol", range(6))
def test_calls_in_a_data_set_create_nothing(tmp_path: Path, protocol: int) -> None:
    row = {"img_id": "test_0001", "sent": "Q", "label": {"yes": 1}, "answer_type": "yes/no", "question_id": 1, "question_type": "is"}
    assert len(load_benchmark(data_file(tmp_path, pickle.dumps([row], protocol))).items) == 1
    for value in (Calls(tmp_path / "ran"), [Calls(tmp_path / "ran")], [row | {"sent": Calls(tmp_path / "ran")}], [row, row | {"label": {"yes": Calls(tmp_path / "ran")}}]):
        with pytest.raises(FormatError):
            read_records(data_file(tmp_path, pickle.dumps(value, protocol)))
    for name in GLOBALS:
        module, _, attribute = name.partition(" ")
        with pytest.raises(FormatError):
            read_records(data_file(tmp_path, b"](c%s\n%s\nX\1\0\0\0a\x85Re." % (module.encode(), attribute.encode())))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("code", [
    b"]q\0h\0a.", b"]q\0(h\0h\0h\0e.", b"](}q\0X\1\0\0\0ah\0se.", b"](}X\1\0\0\0a]se.", b"](}(K\1K\1tK\1se.", b"](}]K\1se.", b"(", b"((.", b"]q\0h\1.", b"]g1\n.", b"]s.",
    b"\x80\x06].", b"](I" + b"9" * 50 + b"\ne.", b"](\x8b\xff\xff\xff\x7fe.", b"](\x8a\xff" + bytes(255) + b"e.", b"](Fnan\ne.", b"](G\x7f\xf0\0\0\0\0\0\0e.",
    b"](X\xff\xff\xff\xffabce.", b"](X\1\0\0\0\xffe.", b"(lp0\n(dp1\nS'a\np2\nI1\nsa.", b"](Sabc\ne.", b"](Ve.", b"](}q\0(X\1\0\0\0aue.",
], ids=range(23))
def test_programs_that_are_no_table(tmp_path: Path, code: bytes) -> None:
    """Lists in themselves, keys that are tuples, numbers that are none or too long, texts and lines without an end."""
    with pytest.raises(FormatError, match="test_vqa.pkl"):
        read_records(data_file(tmp_path, code))


def test_lists_in_lists_in_lists(tmp_path: Path) -> None:
    """2^60 texts, were they ever written out."""
    value: object = "a"
    for _ in range(60):
        value = [value, value]
    for rows in ([{"image": value, "question": "Q", "answer": "A"}], [{"id": value}], [{"label": {"yes": value}}], [value], value):
        with pytest.raises(FormatError, match="more than text and numbers|is a list|row 0 is a list"):
            read_records(data_file(tmp_path, pickle.dumps(rows)))
