"""The decoder in bf16 on llama.cpp: `llamacpp.py decode|prefill`, a worker; or `llamacpp.py greedy FILE VOCABULARY COUNT ID...`, which prints what comes
behind the ids.

llama.cpp's own C functions, which the library inside the wheel exports: `llama_decode` and the logits that it leaves, without the wheel's server and its
sampler. The two structures of parameters are as the library fills them in; only their first fields are named here, and what arrived is asked back.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_float, c_int32, c_uint32, c_void_p

import numpy as np
from cases import GGUF, REAL, best_logp, decode_prompt
from worker import serve
from xllamacpp import xllamacpp

ROOM = 1024  # of the cache; also the most rows at once: the prompt in one go is faster than in halves of 512


class Parameters(ctypes.Structure):
    """llama_context_params or llama_model_params, and room behind them."""

    _fields_ = [("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("others", c_uint32 * 253)]


class Batch(ctypes.Structure):
    """llama_batch"""

    _fields_ = [("n_tokens", c_int32), *((name, c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits"))]


def library() -> ctypes.CDLL:
    c = ctypes.CDLL(xllamacpp.__file__)
    for name, result, *arguments in (
            ("llama_model_default_params", Parameters), ("llama_context_default_params", Parameters),
            ("llama_model_load_from_file", c_void_p, c_char_p, Parameters), ("llama_init_from_model", c_void_p, c_void_p, Parameters),
            ("llama_set_n_threads", None, c_void_p, c_int32, c_int32), ("llama_n_threads", c_int32, c_void_p), ("llama_n_ctx", c_uint32, c_void_p),
            ("llama_n_ubatch", c_uint32, c_void_p), ("llama_batch_get_one", Batch, c_void_p, c_int32), ("llama_decode", c_int32, c_void_p, Batch),
            ("llama_get_logits_ith", POINTER(c_float), c_void_p, c_int32), ("llama_get_memory", c_void_p, c_void_p),
            ("llama_memory_clear", None, c_void_p, c_bool), ("llama_log_set", None, c_void_p, c_void_p)):
        function = getattr(c, name)
        function.restype, function.argtypes = result, arguments
    return c


class Decoder:
    """The decoder of a file with `vocab` tokens, on as many threads as the harness says."""

    def __init__(self, path: os.PathLike[str] | str, vocab: int) -> None:
        self.c, self.vocab, threads = library(), vocab, int(os.environ["OMP_NUM_THREADS"])
        self.quiet = CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda level, text, data: None)
        self.c.llama_log_set(self.quiet, None)
        model = self.c.llama_model_load_from_file(os.fsencode(path), self.c.llama_model_default_params())
        parameters = self.c.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = ROOM
        self.context = self.c.llama_init_from_model(model, parameters)
        self.c.llama_set_n_threads(self.context, threads, threads)
        found = [getattr(self.c, f"llama_{name}")(self.context) for name in ("n_ctx", "n_ubatch", "n_threads")]
        if found != [ROOM, ROOM, threads]:
            raise SystemExit(f"llama.cpp runs with n_ctx, n_ubatch, n_threads {found}: another version than requirements.txt names?")

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Appends ids (n,) -> logits (vocabulary,) of the last, a view."""
        ids = np.ascontiguousarray(ids, np.int32)
        if status := self.c.llama_decode(self.context, self.c.llama_batch_get_one(ids.ctypes.data, len(ids))):
            raise SystemExit(f"llama_decode: {status}")
        return np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, -1), (self.vocab,))

    def forget(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), False)


def decode() -> Callable[[], float]:
    decoder = Decoder(GGUF[1], REAL.vocab)
    logits = decoder.read(decode_prompt())

    def step() -> float:
        nonlocal logits
        logits = decoder.read(logits.argmax(keepdims=True))
        return best_logp(logits)

    return step


def prefill() -> Callable[[], float]:
    decoder = Decoder(GGUF[REAL.layers], REAL.vocab)

    def step() -> float:
        decoder.forget()
        return best_logp(decoder.read(decode_prompt()))

    return step


def greedy(path: str, vocab: str, count: str, *ids: str) -> None:
    decoder = Decoder(path, int(vocab))
    logits = decoder.read(np.array(ids, np.int32))
    for _ in range(int(count)):
        token = logits.argmax(keepdims=True)
        print(int(token[0]))
        logits = decoder.read(token)


if __name__ == "__main__" and sys.argv[1] == "greedy":
    greedy(*sys.argv[2:])
elif __name__ == "__main__":
    serve({"decode": decode, "prefill": prefill}[sys.argv[1]])
