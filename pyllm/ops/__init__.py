"""The compiled operations. Each has a twin of the same name and signature in `pyllm.reference`.

With PYLLM_REFERENCE=1 in the environment these names are the twins, and `REFERENCE` is true.
"""

import os

from pyllm.ops import library
from pyllm.ops.activations import geglu, gelu, relu_squared, sigmoid, silu, swiglu, tanh
from pyllm.ops.adamw import adamw
from pyllm.ops.attention import attention
from pyllm.ops.cross_entropy import cross_entropy, linear_cross_entropy
from pyllm.ops.elementwise import elementwise
from pyllm.ops.embedding import embedding
from pyllm.ops.layer_norm import layer_norm, rms_norm
from pyllm.ops.linear import PackedLinear, linear, pack_linear
from pyllm.ops.paging import PAGE_TILE, next_positions, write_pages
from pyllm.ops.quantized_embedding import quantized_embedding
from pyllm.ops.quantized_linear import PackedQuantizedWeight, QuantizedWeight, pack_quantized, quantized_linear
from pyllm.ops.recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell
from pyllm.ops.rope import rope
from pyllm.ops.route import Routes, route
from pyllm.ops.sample import Sample, sample
from pyllm.ops.wkv import wkv

__all__ = [
    "PAGE_TILE",
    "PackedLinear",
    "PackedQuantizedWeight",
    "QuantizedWeight",
    "Routes",
    "Sample",
    "adamw",
    "attention",
    "cross_entropy",
    "elementwise",
    "embedding",
    "geglu",
    "gelu",
    "gru",
    "gru_cell",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "lstm",
    "lstm_cell",
    "next_positions",
    "pack_linear",
    "pack_quantized",
    "quantized_embedding",
    "quantized_linear",
    "relu_squared",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "rope",
    "route",
    "sample",
    "sigmoid",
    "silu",
    "swiglu",
    "tanh",
    "wkv",
    "write_pages",
]

# With kernels for CUDA devices, where the products of `linear`, `linear_cross_entropy` and recurrent layers' inputs are
# torch's. The others take tensors on the CPU alone.
CUDA = frozenset({
    "adamw", "attention", "cross_entropy", "elementwise", "embedding", "geglu", "gelu", "gru", "gru_cell",
    "layer_norm", "linear", "linear_cross_entropy", "lstm", "lstm_cell", "next_positions", "quantized_embedding",
    "quantized_linear", "relu_squared", "rms_norm", "rnn", "rnn_cell", "rope", "sample", "sigmoid", "silu", "swiglu",
    "tanh", "wkv", "write_pages",
})  # fmt: skip

globals().update(library.register({name: globals()[name] for name in __all__}))

REFERENCE = os.environ.get("PYLLM_REFERENCE", "0") not in ("", "0")
if REFERENCE:
    from pyllm import reference

    globals().update({name: getattr(reference, name) for name in __all__ if hasattr(reference, name)})
