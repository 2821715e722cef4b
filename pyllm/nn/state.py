"""What a model remembers of its sequences between calls. `model.new_state(batch_size)` makes a state and
`model(ids, state=state)` advances it in place; its `lengths` say how many tokens each sequence has seen. Nothing else
in a model changes as it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyllm import ops


class RecurrentState:
    """The hidden vectors of recurrent layers: `vectors`, each (layers * directions, B, hidden)."""

    def __init__(self, *vectors: Tensor):
        self.vectors = vectors
        self.lengths = vectors[0].new_zeros(vectors[0].shape[1], dtype=torch.int64)

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


PAGE_SIZE = ops.PAGE_TILE  # positions of a page


@dataclass
class KeyValueCache:
    """One attention layer's keys and values in pages, (pages, PAGE_SIZE, kv heads, head size) each, or int8 pages, see
    `ops.write_pages`; and the table (B, P), int32, of the pages in which the positions of each sequence are; see
    `ops.attention`. A model's layers share a table."""

    keys: Tensor
    values: Tensor
    page_table: Tensor

    @property
    def capacity(self) -> int:
        """The positions of a sequence that the table has room for."""
        return self.page_table.shape[1] * PAGE_SIZE

    def write(self, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v: (B, T, kv heads, head size) to positions (B, T)."""
        ops.write_pages(self.keys, k, self.page_table, positions)
        ops.write_pages(self.values, v, self.page_table, positions)


def own_pages(batch_size: int, capacity: int, device: torch.device | None = None) -> Tensor:
    """The table of a batch in which each sequence has pages of its own for `capacity` positions."""
    count = -(-capacity // PAGE_SIZE)
    return torch.arange(batch_size * count, dtype=torch.int32, device=device).view(batch_size, count)


class AttentionState:
    """The caches of an attention model's layers, for inference. Sequences of a batch may be of different lengths.

    Args:
        capacity: how many positions a sequence may have, and `reason` what to do or know where it would have more.
    """

    def __init__(self, caches: Sequence[KeyValueCache], capacity: int,
                 reason: str = "make it longer with new_state(batch_size, max_length)"):  # fmt: skip
        self.caches, self.capacity, self.reason = caches, capacity, reason
        self.lengths = caches[0].page_table.new_zeros(len(caches[0].page_table), dtype=torch.int64)

    def positions(self, count: int) -> tuple[Tensor, Tensor]:
        """Those of the next `count` tokens of each sequence, (B, count), and how many keys each then has, (B,)."""
        try:
            return ops.next_positions(self.lengths, count, self.capacity)
        except ValueError as error:
            raise ValueError(f"{error}: {self.reason}") from None

    def advance(self, count: Tensor | int) -> None:
        self.lengths += count


class SourceState(AttentionState):
    """The state of a decoder that also attends to a source: `sources` are each layer's keys and values of that,
    (B, S, heads, head size) each, of which the first `source_lengths` (B,), or all, count; or they are pages, and
    `source_table` says, like that of a `KeyValueCache`, which of them are whose."""

    def __init__(self, caches: Sequence[KeyValueCache], capacity: int, sources: list[tuple[Tensor, Tensor]],
                 source_lengths: Tensor | None, source_table: Tensor | None = None):  # fmt: skip
        super().__init__(caches, capacity)
        self.sources, self.source_lengths, self.source_table = sources, source_lengths, source_table
