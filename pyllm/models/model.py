from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from pyllm import ops


class Model(torch.nn.Module):
    """What every model here answers to, whether it trains, generates or is served.

    A model of your own gives `model_type`, `config` (the constructor's arguments, as plain numbers and strings), `head`
    (the layer from hidden vectors to logits), `hidden` and `new_state`.
    """

    model_type: ClassVar[str]
    config: dict[str, Any]
    context_length: int | None = None  # None: no limit
    head: torch.nn.Linear

    def hidden(self, ids: Tensor, state=None, lengths: Tensor | None = None) -> Tensor:
        """The vectors that the head turns into logits, (B, T, hidden), of ids (B, T).

        With a state, ids continue what it has seen, and it advances in place. `lengths` (B,) says how many of the T ids
        are real where the sequences are padded on the right.
        """
        raise NotImplementedError

    def new_state(self, batch_size: int, max_length: int | None = None):
        """An empty state for `batch_size` sequences of at most `max_length` tokens."""
        raise NotImplementedError

    def forward(self, ids: Tensor, state=None, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocabulary); arguments as in `hidden`."""
        return self.head(self.hidden(ids, state, lengths))

    def loss(self, ids: Tensor, targets: Tensor, state=None, *, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy a token, in nats. Targets of -100 do not count. Unless they are
        softcapped, the logits are never held whole."""
        h = self.hidden(ids, state)
        if getattr(self.head, "softcap", None) is not None:
            return ops.cross_entropy(self.head(h).flatten(0, 1), targets.flatten(), label_smoothing=label_smoothing)
        return ops.linear_cross_entropy(h.flatten(0, 1), self.head.weight, targets.flatten(), self.head.bias,
                                        label_smoothing=label_smoothing)  # fmt: skip

    @property
    def vocab_size(self) -> int:
        return self.head.out_features

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())
