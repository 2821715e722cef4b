"""What a model remembers of its sequences between calls. `model.new_state(batch_size)` makes a state and
`model(ids, state=state)` advances it in place; its `lengths` say how many tokens each sequence has seen. Nothing else
in a model changes as it runs."""

from __future__ import annotations

import torch
from torch import Tensor


class RecurrentState:
    """The hidden vectors of recurrent layers: `vectors`, each (layers * directions, B, hidden)."""

    def __init__(self, *vectors: Tensor):
        self.vectors = vectors
        self.lengths = torch.zeros(vectors[0].shape[1], dtype=torch.int64)

    def advance(self, vectors: tuple[Tensor, ...], count: Tensor | int) -> None:
        if torch.is_grad_enabled():
            self.vectors = vectors
        else:  # in place, so that a recorded step finds them
            for own, new in zip(self.vectors, vectors, strict=True):
                own.copy_(new)
        self.lengths += count

    def detach_(self) -> None:
        """Cuts the gradient here: truncated back-propagation through time."""
        self.vectors = tuple(v.detach() for v in self.vectors)

    def last_rows(self, count: int) -> RecurrentState:
        """The state of the last `count` sequences."""
        state = RecurrentState(*(v[:, -count:].contiguous() for v in self.vectors))
        state.lengths = self.lengths[-count:].clone()
        return state

    def tensors(self) -> dict[str, Tensor]:
        return {f"vectors.{i}": v for i, v in enumerate(self.vectors)} | {"lengths": self.lengths}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.vectors = tuple(tensors[f"vectors.{i}"] for i in range(len(self.vectors)))
        self.lengths = tensors["lengths"]


class KeyValueCache:
    """One attention layer's keys and values, (B, capacity, kv heads, head size) each."""

    def __init__(self, batch_size: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype):
        self.keys = torch.zeros(batch_size, capacity, num_kv_heads, head_dim, dtype=dtype)
        self.values = torch.zeros_like(self.keys)

    def write(self, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v: (B, T, kv heads, head size) to positions (B, T)."""
        rows = torch.arange(len(positions))[:, None]
        self.keys[rows, positions] = k
        self.values[rows, positions] = v


class AttentionState:
    """The caches of an attention model's layers. Sequences of a batch may be of different lengths."""

    def __init__(self, caches: list[KeyValueCache]):
        self.caches = caches
        self.capacity = caches[0].keys.shape[1]
        self.lengths = torch.zeros(len(caches[0].keys), dtype=torch.int64)

    def positions(self, count: int) -> Tensor:
        """Those of the next `count` tokens of each sequence, (B, count)."""
        longest = int(self.lengths.max())
        if longest + count > self.capacity:
            raise ValueError(
                f"the state holds {self.capacity} positions, but got {count} tokens after {longest}: "
                "make it longer with new_state(batch_size, max_length)"
            )
        return self.lengths[:, None] + torch.arange(count)

    def advance(self, count: Tensor | int) -> None:
        self.lengths = self.lengths + count


class SourceState(AttentionState):
    """The state of a decoder that also attends to a source: `sources` are each layer's keys and values of that,
    (B, S, heads, head size) each, of which the first `source_lengths` (B,), or all, count."""

    def __init__(self, caches: list[KeyValueCache], sources: list[tuple[Tensor, Tensor]],
                 source_lengths: Tensor | None):  # fmt: skip
        super().__init__(caches)
        self.sources, self.source_lengths = sources, source_lengths
