"""Each operation in plain torch, written to be read: what the compiled one is tested against.

They take the compiled operations' arguments, in any floating-point dtype: 16-bit inputs are widened to float32, and the
result is rounded once at the end.
"""

from pyllm.reference.activations import geglu, gelu, relu_squared, sigmoid, silu, swiglu, tanh
from pyllm.reference.adamw import adamw
from pyllm.reference.attention import attention
from pyllm.reference.cross_entropy import cross_entropy, linear_cross_entropy
from pyllm.reference.elementwise import elementwise
from pyllm.reference.embedding import embedding
from pyllm.reference.layer_norm import layer_norm, rms_norm
from pyllm.reference.linear import linear, pack_linear
from pyllm.reference.paging import next_positions, write_pages
from pyllm.reference.quantized_embedding import quantized_embedding
from pyllm.reference.quantized_linear import pack_quantized, quantized_linear
from pyllm.reference.recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell
from pyllm.reference.rope import rope
from pyllm.reference.route import route
from pyllm.reference.sample import Sample, sample
from pyllm.reference.wkv import wkv

__all__ = [
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
