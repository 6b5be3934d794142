"""The bytes of a SentencePiece model <-> its pieces, as far as BPE models without normalisation need it, which LLaMA's are.

A protobuf message is a run of fields: key (number << 3 | wire type) as varint, then a varint, 4 or 8 bytes, or length and bytes.
Source: sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stllava.errors import ConfigError, FormatError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces; GGUF has the same numbers."""

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_PIECE, _SCORE, _TYPE = 1, 2, 3  # of SentencePiece
_MODEL_TYPE, _BYTE_FALLBACK, _UNK_PIECE, _BOS_PIECE, _EOS_PIECE = 3, 35, 45, 46, 47  # of TrainerSpec
_NORMALIZER_NAME, _CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5  # of NormalizerSpec
_BPE = 2


@dataclass(frozen=True)
class SentencePieceModel:
    """pieces, scores, types: one each per id. unk, bos, eos: pieces. add_dummy_prefix: a text starts with ▁."""

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unk: str = "<unk>"
    bos: str = "<s>"
    eos: str = "</s>"
    add_dummy_prefix: bool = True

    def to_bytes(self) -> bytes:
        """What `SentencePieceProcessor.LoadFromSerializedProto` and a file tokenizer.model take."""
        out = bytearray()
        for piece, score, kind in zip(self.pieces, self.scores, self.types, strict=True):
            out += _data(_PIECES, _data(_PIECE, piece.encode()) + _key(_SCORE, 5) + struct.pack("<f", score) + _varint(_TYPE, kind))
        trainer = _varint(_MODEL_TYPE, _BPE) + _varint(_BYTE_FALLBACK, BYTE in self.types)
        for number, piece in ((_UNK_PIECE, self.unk), (_BOS_PIECE, self.bos), (_EOS_PIECE, self.eos)):
            trainer += _data(number, piece.encode())
        normalizer = _data(_NORMALIZER_NAME, b"identity") + _varint(_DUMMY_PREFIX, self.add_dummy_prefix) + _varint(_EXTRA_SPACES, 0) \
            + _varint(_ESCAPE_SPACES, 1)
        return bytes(out + _data(_TRAINER, trainer) + _data(_NORMALIZER, normalizer))

    @classmethod
    def from_bytes(cls, data: bytes) -> SentencePieceModel:
        """From a model that the library has loaded already. Raises ConfigError for one that is no BPE model without normalisation."""
        pieces: list[str] = []
        scores: list[float] = []
        types: list[int] = []
        trainer: dict[int, bytes | int] = {}
        normalizer: dict[int, bytes | int] = {}
        for number, value in _fields(data):
            if number == _PIECES:
                piece = dict(_fields(_as_bytes(value)))
                pieces.append(_as_bytes(piece.get(_PIECE, b"")).decode())
                scores.append(struct.unpack("<f", _as_bytes(piece.get(_SCORE, bytes(4))))[0])
                types.append(int(piece.get(_TYPE, NORMAL)))
            elif number == _TRAINER:
                trainer |= dict(_fields(_as_bytes(value)))
            elif number == _NORMALIZER:
                normalizer |= dict(_fields(_as_bytes(value)))
        if trainer.get(_MODEL_TYPE) != _BPE:
            raise ConfigError("the SentencePiece model is not a BPE model; LLaMA's are", field="model_type")
        if normalizer.get(_CHARSMAP) or normalizer.get(_EXTRA_SPACES, 1) or not normalizer.get(_ESCAPE_SPACES, 1):
            raise ConfigError("the SentencePiece model rewrites text (other normalisation than identity); LLaMA's do not", field="normalizer_spec")
        unk, bos, eos = (_as_bytes(trainer.get(number, default)).decode()
                         for number, default in ((_UNK_PIECE, b"<unk>"), (_BOS_PIECE, b"<s>"), (_EOS_PIECE, b"</s>")))
        return cls(pieces, scores, types, unk, bos, eos, bool(normalizer.get(_DUMMY_PREFIX, 1)))


def _as_bytes(value: bytes | int) -> bytes:
    if not isinstance(value, bytes):
        raise FormatError("not a SentencePiece model: a field has another type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of each field: an int for a varint, else the bytes."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _read_varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            size, at = _read_varint(data, at)
        if wire not in (1, 2, 5) or at + size > len(data):
            raise FormatError("not a SentencePiece model: truncated")
        yield key >> 3, data[at:at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise FormatError("not a SentencePiece model: truncated")


def _number(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _key(number: int, wire: int) -> bytes:
    return _number(number << 3 | wire)


def _varint(number: int, value: int) -> bytes:
    return _key(number, 0) + _number(int(value))


def _data(number: int, value: bytes) -> bytes:
    return _key(number, 2) + _number(len(value)) + value
