"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, read with distrust.

Every count, length and offset is checked against the size of the file before anything is made of it. Packed weights are
widened to float32, a piece at a time, by the `gguf` package, which is needed for them only.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import struct
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyllm.checkpoint.files import CheckpointError, short
from pyllm.checkpoint.reader import Entry, Extent, FileReader, check_extents, fill, open_file

_PIECE = 1 << 20  # values widened at a time
_MOST_DIMENSIONS, _LONGEST_NAME, _LARGEST_ALIGNMENT = 4, 65535, 1 << 16
_LARGEST = 1 << 24  # no number of a config is larger


class _Packing(NamedTuple):
    name: str
    values: int  # a block's
    bytes: int
    dtype: torch.dtype | None = None  # None: packed


_PACKINGS = {
    0: _Packing("F32", 1, 4, torch.float32),
    1: _Packing("F16", 1, 2, torch.float16),
    2: _Packing("Q4_0", 32, 18),
    3: _Packing("Q4_1", 32, 20),
    6: _Packing("Q5_0", 32, 22),
    7: _Packing("Q5_1", 32, 24),
    8: _Packing("Q8_0", 32, 34),
    10: _Packing("Q2_K", 256, 84),
    11: _Packing("Q3_K", 256, 110),
    12: _Packing("Q4_K", 256, 144),
    13: _Packing("Q5_K", 256, 176),
    14: _Packing("Q6_K", 256, 210),
    30: _Packing("BF16", 1, 2, torch.bfloat16),
}
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_SLOWING = "rope_freqs.weight"  # what the frequencies of rotary positions are divided by: no weight, but a setting
_BOOL, _STRING, _ARRAY = 7, 8, 9

_ONCE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


class GGUFReader(FileReader):
    """A GGUF file's metadata and, as a Hugging Face checkpoint's, its weights.

    Attributes:
        metadata: strings, numbers, booleans, lists of strings, and NumPy arrays of numbers and booleans.
    """

    def __init__(self, path: Path, file: FileIO, metadata: dict[str, Any], extents: dict[str, Extent],
                 packings: dict[str, int]):  # fmt: skip
        super().__init__(extents, [file])
        self._path, self.metadata, self._packings = path, metadata, packings
        self._slowing = extents.get(_SLOWING)

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face config of the model.

        Raises:
            CheckpointError: a family whose layout is not known here, or a value that is missing or makes no sense.
        """
        config = _config(self._path, self.metadata, self._extents)
        if self._slowing is not None:
            if "rope_scaling" in config or not config["head_dim"]:
                raise CheckpointError(f"{self._path} must have {_SLOWING} or a rope.scaling.type, but has both")
            slowing = super().read(_SLOWING, torch.empty(self._slowing.shape))
            config["rope_scaling"] = _llama3_scaling(self._path, slowing, config["rope_theta"], config["head_dim"])
        return config

    def entries(self) -> dict[str, Entry]:
        return {name: entry for name, entry in super().entries().items() if name != _SLOWING}

    def _fill(self, name: str, extent: Extent, out: Tensor) -> None:
        if name not in self._packings:
            super()._fill(name, extent, out)
            return
        from gguf import GGMLQuantizationType, quants

        kind = self._packings[name]
        packing = _PACKINGS[kind]
        flat, step = out.detach().view(-1), _PIECE // packing.values
        blocks = len(flat) // packing.values
        raw = torch.empty(min(step, blocks) * packing.bytes, dtype=torch.uint8)
        extent.file.seek(extent.begin)
        for begin in range(0, blocks, step):
            count = min(step, blocks - begin)
            piece = raw[: count * packing.bytes]
            fill(extent.file, piece, name)
            with np.errstate(all="ignore"):
                values = quants.dequantize(piece.numpy().reshape(count, -1), GGMLQuantizationType(kind))
            at = begin * packing.values
            flat[at : at + count * packing.values].copy_(torch.from_numpy(values).view(-1))


def open_gguf(path: Path) -> GGUFReader:
    """Reads the metadata of a GGUF file, and where its weights are.

    Raises:
        CheckpointError: the file is truncated, damaged, or of a version or packing that is not known here.
        ImportError: the weights are packed, and the package `gguf` is not there.
    """
    file, size = open_file(path)
    try:
        metadata, extents, packings = _contents(path, file, size)
        if packings and importlib.util.find_spec("gguf") is None:
            kinds = ", ".join(sorted({_PACKINGS[kind].name for kind in packings.values()}))
            raise ImportError(f"{path} has weights packed as {kinds}, which need the package gguf: "
                              "pip install pyllm[gguf]")  # fmt: skip
    except BaseException:
        file.close()
        raise
    return GGUFReader(path, file, metadata, extents, packings)


class _Cursor:
    """Takes values from the beginning of a file, and never more than the file has."""

    def __init__(self, path: Path, file: FileIO, size: int):
        self.where, self.at, self.size = str(path), 0, size
        self._file = BufferedReader(file, 1 << 16)

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise CheckpointError(f"{self.where}: {what} at byte {self.at} must have {count} bytes, "
                                  f"but the file has {self.size - self.at} more")  # fmt: skip
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError(f"{self.where} has become shorter while it was read")
        self.at += count
        return data

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def count(self, what: str, least: int) -> int:
        """How many of something follow, of which each has at least so many bytes."""
        count = self.u64(what)
        if count * least > self.size - self.at:
            raise CheckpointError(
                f"{self.where}: {what} of {count} must fit the file's {self.size - self.at} more bytes"
            )
        return count

    def string(self, what: str, longest: int | None = None) -> str:
        length = self.u64(what)
        if longest is not None and length > longest:
            raise CheckpointError(f"{self.where}: {what} must have at most {longest} bytes, but has {length}")
        return self.text(self.take(length, what), what)

    def text(self, data: bytes, what: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{self.where}: {what} must be UTF-8, but: {e.reason}") from None

    def value(self, kind: int, what: str) -> Any:
        if kind in _NUMBERS:
            number = np.frombuffer(self.take(np.dtype(_NUMBERS[kind]).itemsize, what), _NUMBERS[kind])[0].item()
            if not math.isfinite(number):
                raise CheckpointError(f"{self.where}: {what} must be finite, but is {number}")
            return number
        if kind == _BOOL:
            return bool(self._booleans(1, what)[0])
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise CheckpointError(f"{self.where}: {what} must be of a type up to 12, but is of {kind}")
        kind = self.u32(what)
        if kind in _NUMBERS:
            count = self.count(what, np.dtype(_NUMBERS[kind]).itemsize)
            return np.frombuffer(self.take(count * np.dtype(_NUMBERS[kind]).itemsize, what), _NUMBERS[kind])
        if kind == _BOOL:
            return self._booleans(self.count(what, 1), what)
        if kind == _STRING:
            return [self.string(what) for _ in range(self.count(what, 8))]
        raise CheckpointError(
            f"{self.where}: {what} must be an array of numbers, booleans or strings, but is of {kind}"
        )

    def _booleans(self, count: int, what: str) -> np.ndarray:
        values = np.frombuffer(self.take(count, what), np.uint8)
        if count and values.max() > 1:
            raise CheckpointError(f"{self.where}: {what} must hold booleans, but has a byte of {values.max()}")
        return values.astype(bool)

    def finish(self) -> None:
        self._file.detach()


def _contents(path: Path, file: FileIO, size: int) -> tuple[dict[str, Any], dict[str, Extent], dict[str, int]]:
    cursor = _Cursor(path, file, size)
    try:
        if (magic := cursor.take(4, "the magic number")) != b"GGUF":
            raise CheckpointError(f"{path} must begin with GGUF, but does with {magic!r}")
        if (version := cursor.u32("the version")) not in (2, 3):
            raise CheckpointError(f"{path} must be GGUF of version 2 or 3, little-endian, but is of {version}")
        tensors = cursor.count("the number of tensors", 32 - 8)
        pairs = cursor.count("the number of metadata", 13)
        metadata: dict[str, Any] = {}
        for i in range(pairs):
            key = cursor.string(f"key {i}", _LONGEST_NAME)
            if key in metadata:
                raise CheckpointError(f"{path} must have each key once, but has {short(key)} twice")
            metadata[key] = cursor.value(cursor.u32(short(key)), short(key))
        infos: dict[str, tuple[int, tuple[int, ...], int, int]] = {}
        for i in range(tensors):
            name = cursor.string(f"the name of tensor {i}", _LONGEST_NAME)
            if name in infos:
                raise CheckpointError(f"{path} must have each name once, but has {short(name)} twice")
            infos[name] = _info(cursor, name)
    finally:
        cursor.finish()
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment must be a power of 2 in [8, {_LARGEST_ALIGNMENT}], "
                              f"but is {short(alignment)}")  # fmt: skip
    begin = -(-cursor.at // alignment) * alignment
    check_extents(str(path), [(offset, offset + nbytes, name) for name, (_, _, offset, nbytes) in infos.items()],
                  max(size - begin, 0), alignment)  # fmt: skip

    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    extents: dict[str, Extent] = {}
    packings: dict[str, int] = {}
    for name, (kind, shape, offset, _) in infos.items():
        full, part = _name(name)
        paired: Any = 0
        if metadata.get("general.architecture") == "llama" and part in heads:
            every = metadata.get("llama.attention.head_count")
            paired = metadata.get(heads[part], every)
            if type(paired) is not int or not shape or paired < 1 or shape[0] % (2 * paired):
                raise CheckpointError(f"{path}: {short(name)} must have rows for {short(paired)} heads of even size, "
                                      f"but is of shape {shape}")  # fmt: skip
        if full in extents:
            raise CheckpointError(f"{path} must have each name once, but has {short(full)} twice")
        extents[full] = Extent(file, begin + offset, _PACKINGS[kind].dtype or torch.float32, shape, paired)
        if _PACKINGS[kind].dtype is None:
            packings[full] = kind
    return metadata, extents, packings


def _info(cursor: _Cursor, name: str) -> tuple[int, tuple[int, ...], int, int]:
    """A tensor's packing, shape, offset and size."""
    where = f"{cursor.where}: {short(name)}"
    dimensions = cursor.u32(name)
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise CheckpointError(f"{where} must have 1 to {_MOST_DIMENSIONS} dimensions, but has {dimensions}")
    shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, name))[::-1]
    kind, offset = cursor.u32(name), cursor.u64(name)
    if kind not in _PACKINGS:
        known = ", ".join(packing.name for packing in _PACKINGS.values())
        raise CheckpointError(f"{where} must be one of {known}, but is of GGML's type {kind}")
    packing = _PACKINGS[kind]
    if shape[-1] % packing.values:
        raise CheckpointError(f"{where} of {packing.name} must have rows of whole blocks of {packing.values}, "
                              f"but has rows of {shape[-1]}")  # fmt: skip
    nbytes = math.prod(shape) // packing.values * packing.bytes
    if math.prod(n for n in shape if n) >= 2**63 or nbytes > cursor.size:
        raise CheckpointError(f"{where} of {packing.name} and shape {shape} must have {nbytes} bytes, "
                              f"but the file has {cursor.size}")  # fmt: skip
    return kind, shape, offset, nbytes


def _name(name: str) -> tuple[str, str]:
    """The Hugging Face name of a weight, and which of a layer's it is. An unknown name stays."""
    if name in _ONCE:
        return _ONCE[name], ""
    layer = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(\w+)\.(weight|bias)", name)
    if layer is None or layer[2] not in _LAYER:
        return name, ""
    return f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}", layer[2]


def _config(path: Path, metadata: dict[str, Any], extents: dict[str, Extent]) -> dict[str, Any]:
    family = metadata.get("general.architecture")
    if family not in _ARCHITECTURES:
        raise CheckpointError(f"{path}: general.architecture must be one of {', '.join(_ARCHITECTURES)}, "
                              f"but is {short(family)}")  # fmt: skip
    get = functools.partial(_value, path, metadata)
    embedding = extents.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path} must have a matrix token_embd.weight, but has "
                              f"{embedding and embedding.shape}")  # fmt: skip
    for key in ("expert_count", "attention.sliding_window"):
        if get(f"{family}.{key}", int, 0):
            raise CheckpointError(f"{path}: {family}.{key} must be 0 here, but is {metadata[f'{family}.{key}']}")
    hidden, heads = get(f"{family}.embedding_length", int), get(f"{family}.attention.head_count", int)
    head = get(f"{family}.attention.key_length", int, hidden // max(heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if get(f"{family}.{key}", int, head) != head:
            raise CheckpointError(f"{path}: {family}.{key} must be the head's {head}, but is "
                                  f"{metadata[f'{family}.{key}']}")  # fmt: skip
    config = {
        "model_type": family,
        "architectures": [_ARCHITECTURES[family]],
        "hidden_size": hidden,
        "intermediate_size": get(f"{family}.feed_forward_length", int),
        "num_hidden_layers": get(f"{family}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get(f"{family}.attention.head_count_kv", int, heads),
        "head_dim": head,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": get(f"{family}.context_length", int),
        "rms_norm_eps": get(f"{family}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": get(f"{family}.rope.freq_base", float, 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in extents,
        "attention_bias": "model.layers.0.self_attn.o_proj.bias" in extents,
        "mlp_bias": "model.layers.0.mlp.down_proj.bias" in extents,
    }
    scaling = get(f"{family}.rope.scaling.type", str, "none")
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": get(f"{family}.rope.scaling.factor", float)}
    elif scaling == "yarn":
        config["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": get(f"{family}.rope.scaling.factor", float),
            "original_max_position_embeddings": get(f"{family}.rope.scaling.original_context_length", int),
        }
    elif scaling != "none":
        raise CheckpointError(f"{path}: {family}.rope.scaling.type must be none, linear or yarn, but is {scaling!r}")
    for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id")):
        if (id := get(f"tokenizer.ggml.{key}", int, None)) is not None:
            config[f"{name}_token_id"] = id
    return config


def _llama3_scaling(path: Path, slowing: Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The Hugging Face setting that Llama 3's slowing of rotary positions came from."""
    first, low, high = 8192, 1.0, 4.0  # the same in all of Llama 3
    factor = float(slowing.max()) if slowing.numel() else 0.0
    turns = first * theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim) / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / (kept + (1 - kept) / factor) if 1 <= factor <= _LARGEST else torch.zeros(0)
    if slowing.shape != expected.shape or not torch.allclose(slowing.double(), expected, rtol=1e-4):
        raise CheckpointError(f"{path}: {_SLOWING} must slow rotary positions as Llama 3 does, for {head_dim // 2} "
                              f"frequencies, but is {short(slowing.tolist())}")  # fmt: skip
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": first}  # fmt: skip


_REQUIRED: Any = object()


def _value(path: Path, metadata: dict[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = metadata.get(key, default)
    if value is _REQUIRED:
        raise CheckpointError(f"{path} must have {key} in its metadata, but has not")
    if value is not default and type(value) is not kind:
        raise CheckpointError(f"{path}: {key} must be of {kind.__name__}, but is {short(value)}")
    if kind is int and value is not None and not 0 <= value <= _LARGEST:
        raise CheckpointError(f"{path}: {key} must be in [0, {_LARGEST}], but is {value}")
    return value
