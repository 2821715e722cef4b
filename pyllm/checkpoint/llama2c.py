"""Checkpoints of llama2.c (https://github.com/karpathy/llama2.c), versions 0 and 1: float32, no tokenizer.

Version 0 is seven 32-bit numbers, then the weights, kind by kind, then tables of rotations that are not needed; a
vocabulary below 0 says that the head is not the embedding. Version 1 has a header of 256 bytes.
"""

from __future__ import annotations

import functools
import math
import struct
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from pyllm.checkpoint.files import CheckpointError
from pyllm.checkpoint.reader import Extent, FileReader, halves, open_file

_MAGIC, _HEADER = 0x616B3432, 256
_LARGEST = 1 << 24  # no number of a header is larger
_NUMBERS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_LAYER = "model.layers.{}."


def open_llama2c(path: Path, *, mapped: bool = False) -> tuple[dict[str, Any], FileReader]:
    """The Hugging Face config of a llama2.c checkpoint, and its reader.

    Raises:
        CheckpointError: the header's numbers make no model, or one of another size than the file.
    """
    file, size = open_file(path)
    try:
        config, extents = _contents(path, file, size)
    except BaseException:
        file.close()
        raise
    return config, FileReader(extents, [file], mapped=mapped)


def _contents(path: Path, file: FileIO, size: int) -> tuple[dict[str, Any], dict[str, Extent]]:
    header = file.read(_HEADER)
    if len(header) < _HEADER:
        raise CheckpointError(f"{path} must be a llama2.c checkpoint of more than {_HEADER} bytes, but has {size}")
    magic, version = struct.unpack_from("<Ii", header)
    if magic == _MAGIC:
        if version != 1:
            raise CheckpointError(f"{path} must be a llama2.c checkpoint of version 0 or 1, but is of {version}")
        numbers, tied = struct.unpack_from("<7i", header, 8), header[36]
        if tied > 1 or any(header[37:]):
            raise CheckpointError(f"{path}: its header must end in 0 or 1 and zeros, but does in {header[36:].hex()}")
        begin = _HEADER
    else:
        numbers = struct.unpack_from("<7i", header)
        tied, begin = numbers[5] > 0, 28
        numbers = (*numbers[:5], abs(numbers[5]), numbers[6])
    for name, number in zip(_NUMBERS, numbers, strict=True):
        if not 1 <= number <= _LARGEST:
            raise CheckpointError(f"{path}: {name} must be in [1, {_LARGEST}], but is {number}")
    dim, hidden, layers, heads, kv_heads, vocab, context = numbers
    if dim % (2 * heads) or heads % kv_heads:
        raise CheckpointError(f"{path} must have heads of even size that share keys evenly, but has dim {dim}, "
                              f"n_heads {heads}, n_kv_heads {kv_heads}")  # fmt: skip
    head = dim // heads
    kv = kv_heads * head
    each = {
        "attention_norm": ("input_layernorm.weight", (dim,), 0),
        "wq": ("self_attn.q_proj.weight", (dim, dim), heads),
        "wk": ("self_attn.k_proj.weight", (kv, dim), kv_heads),
        "wv": ("self_attn.v_proj.weight", (kv, dim), 0),
        "wo": ("self_attn.o_proj.weight", (dim, dim), 0),
        "ffn_norm": ("post_attention_layernorm.weight", (dim,), 0),
        "w1": ("mlp.gate_proj.weight", (hidden, dim), 0),
        "w2": ("mlp.down_proj.weight", (dim, hidden), 0),
        "w3": ("mlp.up_proj.weight", (hidden, dim), 0),
    }
    once = {
        "embedding": ("model.embed_tokens.weight", (vocab, dim), 0),
        "norm": ("model.norm.weight", (dim,), 0),
        "head": ("lm_head.weight", (vocab, dim), 0),
        "rotations": (None, (context, head), 0),
    }
    products = ["wq", "wk", "wv", "wo"]
    if magic == _MAGIC:
        order = ["attention_norm", "ffn_norm", "norm", "embedding", *products, "w1", "w2", "w3"]
    else:
        order = ["embedding", "attention_norm", *products, "ffn_norm", "w1", "w2", "w3", "norm", "rotations"]
    if not tied:
        order.append("head")
    expected = begin + 4 * sum(math.prod((each | once)[kind][1]) * (layers if kind in each else 1) for kind in order)
    if size != expected:
        sizes = ", ".join(f"{name} {number}" for name, number in zip(_NUMBERS, numbers, strict=True))
        raise CheckpointError(f"{path} must have {expected} bytes for {sizes}, but has {size}")
    extents: dict[str, Extent] = {}
    for kind in order:
        weight, shape, paired = (each | once)[kind]
        for i in range(layers if kind in each else 1):
            if weight is not None:
                full = _LAYER.format(i) + weight if kind in each else weight
                change = functools.partial(halves, heads=paired) if paired else None
                extents[full] = Extent(file, begin, torch.float32, shape, change)
            begin += 4 * math.prod(shape)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": dim,
              "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
              "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": context,
              "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": bool(tied),
              "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    return config, extents
