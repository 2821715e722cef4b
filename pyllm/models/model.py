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
    family: str | None = None  # the model_type of the Hugging Face checkpoint that it was loaded from
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

    def forward(self, ids: Tensor, state=None, lengths: Tensor | None = None, *,
                attention_mask: Tensor | None = None) -> Tensor:  # fmt: skip
        """Logits (B, T, vocabulary); arguments as in `hidden`.

        In place of lengths, `attention_mask` (B, T) has ones for real ids and zeros for padding on either side, where
        logits mean nothing.
        """
        if attention_mask is None:
            return self.head(self.hidden(ids, state, lengths))
        if lengths is not None:
            raise ValueError("lengths and attention_mask must not both be given")
        to_right, lengths = _padding_to_the_right(ids, attention_mask)
        h = self.hidden(ids.gather(1, to_right), state, lengths)
        back = to_right.argsort(1)[..., None].expand(-1, -1, h.shape[-1])
        return self.head(h.gather(1, back))

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


def _padding_to_the_right(ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(which of its ids each sequence starts with, and goes on with, how many of them are real)."""
    if attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have shape {tuple(ids.shape)}, but got {tuple(attention_mask.shape)}")
    real, places = attention_mask != 0, torch.arange(ids.shape[1])
    lengths, first = real.sum(1), real.int().argmax(1)
    if not torch.equal(real, (places >= first[:, None]) & (places < (first + lengths)[:, None])):
        raise ValueError("attention_mask must have each sequence's ones next to each other")
    return (places + first[:, None]) % ids.shape[1], lengths
