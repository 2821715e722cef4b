"""Reads sentencepiece's .model files and llama2.c's tokenizer files.

A .model file is a protocol buffer (sentencepiece_model.proto). Of it only what changes ids is read; all that is held
beside the file are its pieces.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers

from pyllm.text import vocabulary
from pyllm.text.layouts import Piece
from pyllm.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN

_UNIGRAM, _BPE = 1, 2
_SPACE = "\u2581"


def read_model(data: bytes, arrange: Callable[[list[Piece]], list[Piece]] = list,
               ) -> tuple[tokenizers.Tokenizer, dict[str, int]]:  # fmt: skip
    """The tokenizer of a .model file's contents, and its control tokens' ids by role ("bos", "eos", "unk", "pad").

    `arrange` makes of its pieces those that there are to be, in order of their ids.

    Raises:
        ValueError: the contents are truncated or no .model, or ask for what no other program would do alike.
    """
    pieces: list[Piece] = []
    training: dict[int, Any] = {}
    form: dict[int, Any] = {}
    missing = {2, 3}
    for field, value in _fields(memoryview(data)):
        missing.discard(field)
        if field == 1:
            entry = dict(_fields(_message(value)))
            score, kind = _float(entry.get(2, b"\0\0\0\0")), _integer(entry.get(3, NORMAL))
            pieces.append((_text(entry.get(1, b"")), score, kind))
        elif field == 2:
            training = dict(_fields(_message(value)))
        elif field == 3:
            form = dict(_fields(_message(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    if missing:
        raise ValueError("it is truncated: how it was trained and normalises must follow the pieces")
    if any(not text for text, *_ in pieces):
        raise ValueError("a piece is empty")
    kind = _integer(training.get(3, _UNIGRAM))
    if kind not in (_UNIGRAM, _BPE):
        raise ValueError(f"its model type must be 1 (unigram) or 2 (bpe), but it is {kind}")
    if _integer(training.get(24, 0)) or not _integer(form.get(5, 1)):
        raise ValueError("spaces must be at the beginning of words and spelled U+2581, but it asks for another way")
    texts, scores, types = zip(*arrange(pieces), strict=True)
    backend = vocabulary.sentence_piece(texts, scores, types, unigram=kind == _UNIGRAM,
                                        prefix=bool(_integer(form.get(3, 1))), squeeze=bool(_integer(form.get(4, 1))),
                                        charsmap=bytes(_message(form.get(2, memoryview(b"")))))  # fmt: skip
    roles = {}
    for role, field, default in (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1)):
        id = _integer(training.get(field, default))
        id = id - (1 << 64) if id >= 1 << 63 else id
        if 0 <= id < len(pieces) and pieces[id][0] in texts:
            roles[role] = texts.index(pieces[id][0])
    return backend, roles


def read_llama2c(data: bytes) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    """The tokenizer of llama2.c's tokenizer.bin, as run.c encodes with it, and its control tokens' ids by role.

    The file: the longest token's length, then of each token its score, its length and its bytes.
    """
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    position = 4
    longest = int.from_bytes(data[:4], "little", signed=True)
    while position < len(data):
        if position + 8 > len(data):
            raise ValueError(f"it is truncated at byte {len(data)}")
        score, length = struct.unpack_from("<fi", data, position)
        position += 8
        if not 0 <= length <= min(longest, len(data) - position):
            raise ValueError(f"the token at byte {position} must have at most {longest} bytes, but has {length}")
        piece, id = _text(data[position : position + length]), len(pieces)
        position += length
        kind = {0: UNKNOWN, 1: CONTROL, 2: CONTROL}.get(id, BYTE if id < 259 else NORMAL)
        expected = {0: "<unk>", 1: "\n<s>\n", 2: "\n</s>\n"}.get(id, f"<0x{id - 3:02X}>" if id < 259 else piece)
        if piece != expected:
            raise ValueError(f"token {id} must be {expected!r}, but is {piece!r}")
        pieces.append(piece.strip("\n") if kind == CONTROL else piece.replace(" ", _SPACE))
        scores.append(score)
        types.append(kind)
    if len(pieces) < 259:
        raise ValueError(f"it must hold at least 259 tokens, but holds {len(pieces)}")
    return vocabulary.sentence_piece(pieces, scores, types, unigram=False), {"unk": 0, "bos": 1, "eos": 2}


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """A message's fields: integers for varints, views of the message for all others."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field has the wire type {wire}, which no such file has")
        if length > len(data) - position:
            raise ValueError(f"it is truncated: a field needs {length} bytes, but {len(data) - position} are left")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("it is truncated in the middle of a number")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & ((1 << 64) - 1), position
    raise ValueError("a number has more than 10 bytes")


def _message(value: Any) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a field must be a message, but is a number")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError("a field must be an integer, but is none")
    return value


def _float(value: Any) -> float:
    if isinstance(value, int) or len(value) != 4:
        raise ValueError("a score must have 4 bytes")
    return struct.unpack("<f", value)[0]


def _text(value: Any) -> str:
    try:
        return bytes(_message(value)).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("a piece is no UTF-8") from None
