"""The blocks that models are built from: torch's modules, names and state dicts, on pyllm's operations."""

from pyllm.nn.attention import Attention, CrossAttention
from pyllm.nn.embedding import Embedding
from pyllm.nn.feed_forward import Experts, FeedForward
from pyllm.nn.linear import Head, Linear
from pyllm.nn.norm import LayerNorm, RMSNorm
from pyllm.nn.position import RelativeBias, SinusoidalEmbedding, rope_frequencies
from pyllm.nn.quantized import Quantizable
from pyllm.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from pyllm.nn.rwkv import ChannelMix, TimeMix
from pyllm.nn.state import AttentionState, KeyValueCache, RecurrentState, SourceState, own_pages

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Attention",
    "AttentionState",
    "ChannelMix",
    "CrossAttention",
    "Embedding",
    "Experts",
    "FeedForward",
    "GRUCell",
    "Head",
    "KeyValueCache",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "Quantizable",
    "RMSNorm",
    "RNNCell",
    "RecurrentState",
    "RelativeBias",
    "SinusoidalEmbedding",
    "SourceState",
    "TimeMix",
    "own_pages",
    "rope_frequencies",
]
