from __future__ import annotations

import torch
from torch import Tensor

from pyllm import nn
from pyllm.models.model import Model
from pyllm.nn import AttentionState, KeyValueCache

NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}


class Block(torch.nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); each norm takes in the addition before it."""

    def __init__(self, config: dict):
        super().__init__()
        norm, hidden = NORMS[config["norm"]], config["hidden_size"]
        self.attention_norm = norm(hidden, config["norm_eps"])
        self.attention = nn.Attention(hidden, config["num_heads"], config["num_kv_heads"], config["head_dim"],
                                      rope_theta=config["rope_theta"], qkv_bias=config["qkv_bias"],
                                      bias=config["bias"])  # fmt: skip
        self.feed_forward_norm = norm(hidden, config["norm_eps"])
        self.feed_forward = nn.FeedForward(
            hidden, config["intermediate_size"], config["activation"], bias=config["bias"]
        )
        self.dropout = torch.nn.Dropout(config["dropout"])

    def forward(self, delta: Tensor | None, x: Tensor, positions: Tensor,
                cache: KeyValueCache | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x: the stream so far, and delta what is still to be added to it; returns the next such pair."""
        y, x = (self.attention_norm(x), x) if delta is None else self.attention_norm(delta, x)
        y = self.dropout(self.attention(y, positions, cache))
        y, x = self.feed_forward_norm(y, x)
        return self.dropout(self.feed_forward(y)), x


class Decoder(Model):
    """A GPT: decoder-only Transformer with norms before each layer, by default as in Llama (rotary positions, RMS norm,
    SwiGLU); `position="learned", norm="layer_norm", activation="gelu", bias=True, qkv_bias=True` make it GPT-2's."""

    model_type = "decoder"

    def __init__(self, vocab_size: int, hidden_size: int = 256, num_layers: int = 4, num_heads: int = 4, *,
                 num_kv_heads: int | None = None, head_dim: int | None = None, intermediate_size: int | None = None,
                 context_length: int = 256, position: str = "rope", rope_theta: float = 10000.0,
                 norm: str = "rms_norm", norm_eps: float = 1e-5, activation: str = "swiglu", qkv_bias: bool = False,
                 bias: bool = False, tie_embeddings: bool = True, dropout: float = 0.0):  # fmt: skip
        super().__init__()
        if position not in ("rope", "learned"):
            raise ValueError(f"position must be 'rope' or 'learned', but got {position!r}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, but got {norm!r}")
        if intermediate_size is None:  # the usual 4x, or as many parameters with a gate
            wide = 4 * hidden_size
            intermediate_size = (wide * 2 // 3 + 31) // 32 * 32 if activation in nn.feed_forward.GATED else wide
        self.config = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers,
                       "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
                       "intermediate_size": intermediate_size, "context_length": context_length,
                       "position": position, "rope_theta": rope_theta, "norm": norm, "norm_eps": norm_eps,
                       "activation": activation, "qkv_bias": qkv_bias, "bias": bias,
                       "tie_embeddings": tie_embeddings, "dropout": dropout}  # fmt: skip
        self.context_length = context_length
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(context_length, hidden_size) if position == "learned" else None
        block = self.config if position == "rope" else self.config | {"rope_theta": None}
        self.blocks = torch.nn.ModuleList(Block(block) for _ in range(num_layers))
        self.norm = NORMS[norm](hidden_size, norm_eps)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.dropout = torch.nn.Dropout(dropout)
        self._initialise()
        if tie_embeddings:
            self.head.weight = self.embedding.weight

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        for block in self.blocks:  # what adds to the stream starts smaller, by the number of additions (GPT-2)
            for layer in (block.attention.out, block.feed_forward.down):
                torch.nn.init.normal_(layer.weight, std=0.02 * (2 * len(self.blocks)) ** -0.5)

    def hidden(self, ids: Tensor, state: AttentionState | None = None, lengths: Tensor | None = None) -> Tensor:
        time = ids.shape[1]
        positions = torch.arange(time) if state is None else state.positions(time)
        if self.context_length < (time if state is None else int(state.lengths.max()) + time):
            raise ValueError(f"the model's context is {self.context_length} tokens, but got {time} ids"
                             + ("" if state is None else f" after {int(state.lengths.max())}"))  # fmt: skip
        x = self.embedding(ids)  # (B, T, hidden)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        x, delta = self.dropout(x), None
        for i, block in enumerate(self.blocks):
            delta, x = block(delta, x, positions, None if state is None else state.caches[i])
        if state is not None:
            state.advance(time if lengths is None else lengths)
        return self.norm(x) if delta is None else self.norm(delta, x)[0]

    def new_state(self, batch_size: int, max_length: int | None = None) -> AttentionState:
        attention, dtype = self.blocks[0].attention, self.head.weight.dtype
        capacity = self.context_length if max_length is None else min(max_length, self.context_length)
        return AttentionState([KeyValueCache(batch_size, capacity, attention.num_kv_heads, attention.head_dim, dtype)
                               for _ in self.blocks])  # fmt: skip
