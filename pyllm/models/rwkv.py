from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from pyllm import nn
from pyllm.models.model import Model
from pyllm.nn import RecurrentState


class Block(torch.nn.Module):
    """x + time_mix(norm(x)), then x + channel_mix(norm(x)); each norm takes in the addition before it."""

    adds_later = True  # gives what is still to be added to the stream, and the stream so far

    def __init__(self, config: dict, layer: int):
        super().__init__()
        hidden, eps, bias = config["hidden_size"], config["norm_eps"], config["norm_bias"]
        self.time_norm = nn.LayerNorm(hidden, eps, bias=bias)
        self.time_mix = nn.TimeMix(hidden, config["head_dim"], decay_rank=config["decay_rank"],
                                   rate_rank=config["rate_rank"], value_rank=config["value_rank"] if layer else None,
                                   gate_rank=config["gate_rank"], norm_eps=eps)  # fmt: skip
        self.channel_norm = nn.LayerNorm(hidden, eps, bias=bias)
        self.channel_mix = nn.ChannelMix(hidden, config["intermediate_size"])
        self.dropout = torch.nn.Dropout(config["dropout"])

    def forward(self, delta: Tensor | None, x: Tensor, first_value: Tensor | None, memory: tuple[Tensor | None, ...],
                lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """x: the stream so far, and delta what is still to be added to it; returns the next such pair, the first
        layer's values, and the memory: both layers' last inputs and the time mix's state."""
        last_time, last_channel, state = memory
        y, x = (self.time_norm(x), x) if delta is None else self.time_norm(delta, x)
        y, first_value, last_time, state = self.time_mix(y, first_value, last_time, state, lengths)
        y, x = self.channel_norm(self.dropout(y), x)
        y, last_channel = self.channel_mix(y, last_channel, lengths)
        return self.dropout(y), x, first_value, (last_time, last_channel, state)


class RWKV(Model):
    """RWKV-7 "Goose" (Peng et al., 2025, https://arxiv.org/abs/2503.14456): a recurrent network whose layers remember
    in matrices, by a linear recurrence, so that it trains on whole sequences; its state does not grow.

    Args:
        head_dim: keys and values of a head; a head's state has head_dim^2 numbers.
        decay_rank, rate_rank, value_rank, gate_rank: of the layers that make the decay, the rate of learning, the
            mixture with the first layer's values, and the gate; by default they grow with sqrt(hidden_size).
        embedding_norm: the embedding of the ids is normalised.
    """

    model_type = "rwkv"

    def __init__(self, vocab_size: int, hidden_size: int = 256, num_layers: int = 4, *, head_dim: int = 64,
                 intermediate_size: int | None = None, decay_rank: int | None = None, rate_rank: int | None = None,
                 value_rank: int | None = None, gate_rank: int | None = None, norm_eps: float = 1e-5,
                 norm_bias: bool = True, embedding_norm: bool = True, tie_embeddings: bool = False,
                 dropout: float = 0.0):  # fmt: skip
        super().__init__()

        def rank(given: int | None, factor: float) -> int:
            return max(32, round(factor * hidden_size**0.5 / 32) * 32) if given is None else given

        self.config = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers,
                       "head_dim": head_dim, "intermediate_size": intermediate_size or 4 * hidden_size,
                       "decay_rank": rank(decay_rank, 2.5), "rate_rank": rank(rate_rank, 2.5),
                       "value_rank": rank(value_rank, 1.7), "gate_rank": rank(gate_rank, 5.0),
                       "norm_eps": norm_eps, "norm_bias": norm_bias, "embedding_norm": embedding_norm,
                       "tie_embeddings": tie_embeddings, "dropout": dropout}  # fmt: skip
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.embedding_norm = nn.LayerNorm(hidden_size, norm_eps, bias=norm_bias) if embedding_norm else None
        self.blocks = torch.nn.ModuleList(Block(self.config, i) for i in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size, norm_eps, bias=norm_bias)
        self.head = nn.Head(hidden_size, vocab_size)
        self._initialise()
        if tie_embeddings:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def _initialise(self) -> None:
        """As the paper does it, with normal distributions of the same size for orthogonal matrices."""
        hidden, layers, dim = (self.config[key] for key in ("hidden_size", "num_layers", "head_dim"))
        scale = hidden**-0.5
        torch.nn.init.uniform_(self.embedding.weight, -1e-4, 1e-4)
        torch.nn.init.normal_(self.head.weight, std=0.5 * scale)
        at = torch.arange(hidden)
        ramp, centred = at / hidden, at / max(hidden - 1, 1) - 0.5
        within = (at % dim - (dim - 1) / 2) / max((dim - 1) / 2, 1)
        zigzag = within * within.abs()
        for i, block in enumerate(cast(Iterable[Block], self.blocks)):
            mix, deep, left = block.time_mix, i / max(layers - 1, 1), 1 - i / layers
            for part, power in zip(mix.mix, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
                part.copy_(1 - ramp ** (power * left))
            block.channel_mix.mix.copy_(1 - ramp ** (left**4))
            for low in (mix.decay, mix.rate, mix.value_mix, mix.gate):
                if low is not None:
                    torch.nn.init.zeros_(low.down.weight)
                    torch.nn.init.normal_(low.up.weight, std=0.1 * scale)
            mix.decay.up.bias.copy_(6 * (centred + 0.5) ** (1 + deep**0.3) - 5.5 + 2.5 * zigzag)
            mix.rate.up.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * centred)
            if mix.value_mix is not None:
                mix.value_mix.up.bias.copy_(0.73 - 0.4 * centred)
            mix.removal.copy_(0.71 - 0.1 * centred)
            torch.nn.init.constant_(mix.replacement, 1.02)
            torch.nn.init.constant_(mix.bonus, -0.04)
            torch.nn.init.constant_(mix.norm.weight, ((i + 1) / layers) ** 0.7)
            for linear, size in ((mix.receptance, 0.5), (mix.key, 0.05), (mix.value, 0.5), (mix.out, 0.0),
                                 (block.channel_mix.feed_forward.up, 0.5),
                                 (block.channel_mix.feed_forward.down, 0.0)):  # fmt: skip
                torch.nn.init.uniform_(linear.weight, -size * scale, size * scale)

    def hidden(self, ids: Tensor, state: RecurrentState | None = None, lengths: Tensor | None = None) -> Tensor:
        x, delta, first_value, memories = self.embedding(ids), None, None, []  # (B, T, hidden)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        for i, block in enumerate(self.blocks):
            memory = (None, None, None) if state is None else tuple(t[i] for t in state.vectors)
            delta, x, first_value, memory = block(delta, x, first_value, memory, lengths)
            memories.append(memory)
        if state is not None:
            state.advance(tuple(torch.stack(t) for t in zip(*memories, strict=True)),
                          ids.shape[1] if lengths is None else lengths)  # fmt: skip
        return self.norm(delta, x)[0]

    def new_state(self, batch_size: int, max_length: int | None = None) -> RecurrentState:
        hidden, layers, dim = (self.config[key] for key in ("hidden_size", "num_layers", "head_dim"))
        last = torch.zeros(2, layers, batch_size, hidden, dtype=self.dtype, device=self.device)
        return RecurrentState(*last, torch.zeros(layers, batch_size, hidden // dim, dim, dim, device=self.device))
