from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from pyllm import nn
from pyllm.models.model import Model, initialise
from pyllm.nn import AttentionState, KeyValueCache
from pyllm.nn.norm import NORMS


class Block(torch.nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), or the sum of both where they are parallel; each norm
    takes in the addition before it. Post norms are of what gets added."""

    adds_later = True  # gives what is still to be added to the stream, and the stream so far

    def __init__(self, config: dict, layer: int):
        super().__init__()
        norm = partial(NORMS[config["norm"]], eps=config["norm_eps"])
        hidden, windowed = config["hidden_size"], config["window_layers"]
        windowed = config["window"] is not None and (windowed is None or layer in windowed)
        theta, scaling = config["rope_theta"], config["rope_scaling"]
        if windowed and config["window_rope_theta"] is not None:
            theta, scaling = config["window_rope_theta"], None
        self.parallel = config["parallel_residual"]
        self.attention_norm = norm(hidden)
        self.attention = nn.Attention(hidden, config["num_heads"], config["num_kv_heads"], config["head_dim"],
                                      rope_theta=theta if config["position"] == "rope" else None,
                                      rotary_dim=config["rotary_dim"], rope_scaling=scaling,
                                      alibi=config["position"] == "alibi",
                                      window=config["window"] if windowed else None,
                                      scale=config["attention_scale"], softcap=config["attention_softcap"],
                                      head_norm=norm if config["head_norm"] else None,
                                      qkv_bias=config["qkv_bias"], bias=config["bias"],
                                      dropout=config["attention_dropout"])  # fmt: skip
        self.attention_post_norm = norm(hidden) if config["post_norms"] else None
        self.feed_forward_norm = norm(hidden)
        size, options = (hidden, config["intermediate_size"], config["activation"]), {"bias": config["mlp_bias"]}
        if config["num_experts"]:
            options |= {"num_experts": config["num_experts"], "active": config["active_experts"],
                        "normalised": config["normalised_experts"]}  # fmt: skip
        self.feed_forward = (nn.Experts if config["num_experts"] else nn.FeedForward)(*size, **options)
        self.feed_forward_post_norm = norm(hidden) if config["post_norms"] else None
        self.dropout = torch.nn.Dropout(config["dropout"])

    def forward(self, delta: Tensor | None, x: Tensor, positions: Tensor, cache: KeyValueCache | None,
                lengths: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x: the stream so far, and delta what is still to be added to it; returns the next such pair. The rest is as
        in `nn.Attention`."""
        y, x = (self.attention_norm(x), x) if delta is None else self.attention_norm(delta, x)
        y = self.attention(y, positions, cache, lengths)
        y = self.dropout(y if self.attention_post_norm is None else self.attention_post_norm(y))
        if self.parallel:
            return y + self.dropout(self.feed_forward(self.feed_forward_norm(x))), x
        y, x = self.feed_forward_norm(y, x)
        y = self.feed_forward(y)
        return self.dropout(y if self.feed_forward_post_norm is None else self.feed_forward_post_norm(y)), x


class Decoder(Model):
    """A GPT: decoder-only Transformer with norms before each layer, by default as in Llama (rotary positions, RMS norm,
    SwiGLU); `position="learned", norm="layer_norm", activation="gelu", bias=True, qkv_bias=True` make it GPT-2's.

    Args:
        head_dim: of queries, keys and values; hidden_size / num_heads by default.
        rotary_dim, rope_theta, rope_scaling: how many elements of a head turn, by what; see `nn.rope_frequencies`.
        window, window_layers, window_rope_theta: the keys that a query sees in those layers (by default in all), and
            the unscaled theta used there if it is another.
        head_norm: queries and keys are normalised, head by head.
        attention_scale, attention_softcap, logit_softcap: see `ops.attention`; 1 / sqrt(head_dim) by default, and none.
        norm: "rms_norm", "layer_norm", or "one_plus_rms_norm", which multiplies by 1 + weight.
        post_norms: norms also after attention and feed-forward layer.
        parallel_residual: both read the same stream, and are added to it together.
        num_experts, active_experts, normalised_experts: feed-forward layers are mixtures of so many, so many of them
            for each token, with weights that sum to one.
        bias, qkv_bias, mlp_bias: of the linear layers, of queries, keys and values, of feed-forward layers (as `bias`).
        position: "rope", "learned", or "alibi", a bias of attention's scores.
        embedding_scale, embedding_norm: the embedding of the ids is multiplied, and normalised.
        dropout, embedding_dropout, attention_dropout: of what layers add, of embeddings (as `dropout`), and of
            attention's weights.
    """

    model_type = "decoder"
    context_length: int

    def __init__(self, vocab_size: int, hidden_size: int = 256, num_layers: int = 4, num_heads: int = 4, *,
                 num_kv_heads: int | None = None, head_dim: int | None = None, intermediate_size: int | None = None,
                 context_length: int = 256, position: str = "rope", rope_theta: float = 10000.0,
                 rotary_dim: int | None = None, rope_scaling: dict[str, Any] | None = None,
                 window: int | None = None, window_layers: Sequence[int] | None = None,
                 window_rope_theta: float | None = None, head_norm: bool = False,
                 attention_scale: float | None = None, attention_softcap: float | None = None,
                 logit_softcap: float | None = None, norm: str = "rms_norm", norm_eps: float = 1e-5,
                 post_norms: bool = False, parallel_residual: bool = False, activation: str = "swiglu",
                 num_experts: int = 0, active_experts: int = 2, normalised_experts: bool = True,
                 qkv_bias: bool = False, bias: bool = False, mlp_bias: bool | None = None,
                 embedding_scale: float | None = None, embedding_norm: bool = False, tie_embeddings: bool = True,
                 dropout: float = 0.0, embedding_dropout: float | None = None,
                 attention_dropout: float = 0.0):  # fmt: skip
        super().__init__()
        if position not in ("rope", "learned", "alibi"):
            raise ValueError(f"position must be 'rope', 'learned' or 'alibi', but got {position!r}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, but got {norm!r}")
        if parallel_residual and post_norms:
            raise ValueError("parallel_residual and post_norms must not both be set")
        if intermediate_size is None:
            intermediate_size = nn.feed_forward.usual_size(hidden_size, activation)
        self.config = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers,
                       "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
                       "intermediate_size": intermediate_size, "context_length": context_length,
                       "position": position, "rope_theta": rope_theta, "rotary_dim": rotary_dim,
                       "rope_scaling": rope_scaling, "window": window,
                       "window_layers": None if window_layers is None else list(window_layers),
                       "window_rope_theta": window_rope_theta, "head_norm": head_norm,
                       "attention_scale": attention_scale, "attention_softcap": attention_softcap,
                       "logit_softcap": logit_softcap, "norm": norm, "norm_eps": norm_eps,
                       "post_norms": post_norms, "parallel_residual": parallel_residual, "activation": activation,
                       "num_experts": num_experts, "active_experts": active_experts,
                       "normalised_experts": normalised_experts, "qkv_bias": qkv_bias, "bias": bias,
                       "mlp_bias": bias if mlp_bias is None else mlp_bias,
                       "embedding_scale": embedding_scale, "embedding_norm": embedding_norm,
                       "tie_embeddings": tie_embeddings, "dropout": dropout,
                       "embedding_dropout": dropout if embedding_dropout is None else embedding_dropout,
                       "attention_dropout": attention_dropout}  # fmt: skip
        self.context_length, self.embedding_scale = context_length, embedding_scale
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.embedding_norm = NORMS[norm](hidden_size, norm_eps) if embedding_norm else None
        self.position_embedding = nn.Embedding(context_length, hidden_size) if position == "learned" else None
        self.blocks = torch.nn.ModuleList(Block(self.config, i) for i in range(num_layers))
        self.norm = NORMS[norm](hidden_size, norm_eps)
        self.head = nn.Head(hidden_size, vocab_size, softcap=logit_softcap)
        self.dropout = torch.nn.Dropout(self.config["embedding_dropout"])
        initialise(self, 2 * num_layers)
        if tie_embeddings:
            self.head.weight = self.embedding.weight

    def hidden(self, ids: Tensor, state: AttentionState | None = None, lengths: Tensor | None = None) -> Tensor:
        time = ids.shape[1]
        if time > self.context_length:
            raise ValueError(f"{self._context()}, but got {time} ids{self._beyond()}")
        positions, total = (torch.arange(time, device=ids.device), None) if state is None else state.positions(time)
        x = self.embedding(ids)  # (B, T, hidden)
        if self.embedding_scale is not None:
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        x, delta = self.dropout(x), None
        for i, block in enumerate(self.blocks):
            delta, x = block(delta, x, positions, None if state is None else state.caches[i], total)
        if state is not None:
            state.advance(time if lengths is None else lengths)
        return self.norm(x) if delta is None else self.norm(delta, x)[0]

    def new_state(self, batch_size: int, max_length: int | None = None) -> AttentionState:
        capacity = self.context_length if max_length is None else min(max_length, self.context_length)
        table, blocks = nn.own_pages(batch_size, capacity, self.device), cast(Iterable[Block], self.blocks)
        caches = [block.attention.new_cache(table, table.numel(), self.dtype) for block in blocks]
        if capacity < self.context_length:
            return AttentionState(caches, capacity)
        return AttentionState(caches, capacity, self._context() + self._beyond())

    def _context(self) -> str:
        return f"the model's context is {self.context_length} tokens"

    def _beyond(self) -> str:
        scaling = self.config["rope_scaling"] or {}
        kind = scaling.get("rope_type")
        return (f": beyond, {kind} scaling turns the positions before in another way, which what is cached of them "
                "would contradict" if kind in nn.position.BOUND else "") + (
                "; pyllm.load(..., long=True) is for longer texts" if kind == "longrope" and not scaling.get("long")
                else "")  # fmt: skip
