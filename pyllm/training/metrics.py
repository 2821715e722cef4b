from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyllm import ops
from pyllm.data import SequenceLoader
from pyllm.models import Model
from pyllm.nn import RecurrentState
from pyllm.nn.evaluating import evaluating

IGNORED = -100  # a target that does not count, as in torch
Inputs = Tensor | Mapping[str, Any]  # ids, or all arguments of a model by name


@dataclass
class Metrics:
    """How well a model predicts each next token."""

    loss: float  # nats a token
    accuracy: float  # share of tokens that were the model's first choice
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits to code each of the `num_bytes` bytes of the text that these tokens are."""
        return self.loss * self.tokens / math.log(2) / num_bytes


@dataclass
class History:
    """The course of a training: the loss of every step, and what the validation gave, as (step, metrics)."""

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, Metrics]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> History:
        return cls(
            data["losses"], [(step, Metrics(**m)) for step, m in data["validation"]], data["seconds"], data["tokens"]
        )


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model's first parameter is; the CPU, if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def moved(inputs: Any, device: torch.device) -> Any:
    """Inputs of a model on a device: a tensor, or what holds several; anything else stays as it is."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: moved(value, device) for key, value in inputs.items()}
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(moved(value, device) for value in inputs))
    return inputs


def logits_of(model: torch.nn.Module, inputs: Inputs, state: RecurrentState | None) -> Tensor:
    """A model's logits; one that returns (logits, hidden state), as recurrent models often do, is understood too."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    out = model(inputs) if state is None else model(inputs, state)
    return out[0] if isinstance(out, tuple) else out


def state_to_carry(
    model: torch.nn.Module, loader: Iterable, carry: bool | None
) -> Callable[[int], RecurrentState] | None:
    """Makes the state that goes from one batch to the next, or None where each batch starts anew.

    By default (carry=None) a recurrent model carries its state over batches that continue each other.
    """
    if isinstance(loader, SequenceLoader) and isinstance(model, Model) and not model.causal:
        raise ValueError(f"the targets of a SequenceLoader are the next tokens, which {type(model).__name__} sees")
    contiguous = getattr(loader, "contiguous", False)
    if carry and not contiguous:
        raise ValueError("carry_state=True needs batches that continue each other: a SequenceLoader without shuffle")
    if carry is False or not contiguous or not isinstance(model, Model):
        return None
    make = model.new_state
    if isinstance(make(1, 1), RecurrentState):
        return make
    if carry:
        raise ValueError(f"carry_state=True needs a recurrent model, but got {type(model).__name__}")
    return None


def next_state(make: Callable[[int], RecurrentState], state: RecurrentState | None, rows: int) -> RecurrentState:
    """What a batch of `rows` goes on from; a smaller one continues the last rows of the batch before it."""
    if state is None or len(state.lengths) < rows:
        return make(rows)
    return state if len(state.lengths) == rows else state.last_rows(rows)


@torch.no_grad()
def test(model: torch.nn.Module, loader: Iterable[tuple[Inputs, Tensor]], criterion: Callable | None = None, *,
         carry_state: bool | None = None) -> Metrics:  # fmt: skip
    """Loss, perplexity and next-token accuracy of a model over a loader of (inputs, targets), each (B, T).

    Inputs may be a dict of a model's arguments, and targets the one label of each sequence, (B,).

    Args:
        criterion: called with logits (N, vocabulary) and targets (N,), giving their mean loss; default cross-entropy.
        carry_state: see `train`.

    Raises:
        ValueError: the loader gives no target that counts.
    """
    make_state, device = state_to_carry(model, loader, carry_state), device_of(model)
    loss, right, tokens, state = 0.0, 0, 0, None
    with evaluating(model):
        for inputs, targets in loader:
            if make_state:
                state = next_state(make_state, state, len(inputs))
            inputs, targets = moved(inputs, device), targets.to(device)
            logits, flat = logits_of(model, inputs, state).flatten(0, -2), targets.flatten()
            kept = flat != IGNORED
            count = int(kept.sum())
            if count:
                mean = ops.cross_entropy(logits, flat) if criterion is None else criterion(logits, flat)
                loss += float(mean) * count
                right += int(((logits.argmax(-1) == flat) & kept).sum())
                tokens += count
    if not tokens:
        raise ValueError("the loader gave no target to score")
    return Metrics(loss / tokens, right / tokens, tokens)
