from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyllm import ops
from pyllm.engine.whole import whole_ids
from pyllm.runtime import raise_found


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the settings are those of `pyllm.ops.sample`, which checks them.

    temperature 0 is greedy. With the same seed a sequence is the same whatever it shares a batch with; with seed None
    one is drawn. With `allowed_ids` no other id is drawn; `logit_bias` is (vocabulary,).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Tensor | None = None
    allowed_ids: Sequence[int] | None = None
    seed: int | None = None

    @property
    def looks_back(self) -> bool:
        """Whether there are penalties, for which the ids so far are needed."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)

    def check(self) -> None:
        """Raises what `pyllm.ops.sample` does of settings out of their bounds."""
        ops.sample(torch.zeros(1, 1), seeds=self.seed or 0, positions=0, history=torch.zeros(1, 1, dtype=torch.int64),
                   **self.settings())  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """What `pyllm.ops.sample` takes, but for seed and `bias`."""
        names = {f.name for f in dataclasses.fields(self)} - {"seed", "logit_bias", "allowed_ids"}
        return {name: getattr(self, name) for name in names}

    def with_seed(self) -> SamplingParams:
        return self if self.seed is not None else dataclasses.replace(self, seed=secrets.randbits(63))

    def spread(self, n: int) -> list[SamplingParams]:
        """The settings for n samples: each has the seed of the one before, and 1."""
        assert self.seed is not None
        return [dataclasses.replace(self, seed=(self.seed + i + 2**63) % 2**64 - 2**63) for i in range(n)]

    def bias(self, vocabulary: int) -> Tensor | None:
        """What is added to the logits, (vocabulary,), float32: `logit_bias`, and -infinity where an id is not allowed.

        Raises:
            ValueError: a bias of another shape, or no allowed id. TypeError: one that is no whole number. IndexError:
            one that is not in the vocabulary.
        """
        bias = self.logit_bias
        if bias is not None and bias.shape != (vocabulary,):
            raise ValueError(f"[sampling] logit_bias must have shape ({vocabulary},), but got {tuple(bias.shape)}")
        if self.allowed_ids is None:
            return None if bias is None else bias.float().cpu()
        allowed = torch.tensor(whole_ids("an allowed id", self.allowed_ids), dtype=torch.int64)
        if not len(allowed):
            raise ValueError("[sampling] allowed_ids must have at least one id")
        if (wrong := allowed[(allowed < 0) | (allowed >= vocabulary)]).numel():
            raise IndexError(f"[sampling] allowed_ids must be from 0 to {vocabulary - 1}, but got {int(wrong[0])}")
        masked = torch.full((vocabulary,), float("-inf"))
        masked[allowed] = 0.0 if bias is None else bias.float().cpu()[allowed]
        return masked


@dataclass
class Sampler:
    """Draws the next id of each sequence of a batch. `sequences` are all ids so far, which the penalties look at."""

    params: SamplingParams
    sequences: list[list[int]]
    seeds: Tensor = field(init=False)
    bias: Tensor | None = field(init=False, default=None)

    def __post_init__(self):
        self.params = self.params.with_seed()
        self.seeds = torch.full((len(self.sequences),), self.params.seed, dtype=torch.int64)

    def draw(self, logits: Tensor, positions: Tensor, history: Tensor | None = None) -> Tensor:
        """The ids (B,) drawn at `positions` (B,) from logits (B, vocabulary)."""
        if self.bias is None:
            bias = self.params.bias(logits.shape[1])
            self.bias = None if bias is None else bias.to(logits.device)
        return ops.sample(logits, seeds=self.seeds, positions=positions, history=history, logit_bias=self.bias,
                          **self.params.settings()).ids  # fmt: skip

    def note(self, ids: list[int]) -> None:
        """Appends what was drawn to the sequences."""
        for sequence, i in zip(self.sequences, ids, strict=True):
            sequence.append(i)

    def __call__(self, logits: Tensor) -> list[int]:
        """logits (B, vocabulary) -> the ids drawn, which are appended to the sequences."""
        history = None
        if self.params.looks_back:
            history = torch.nn.utils.rnn.pad_sequence([torch.tensor(s, dtype=torch.int64) for s in self.sequences],
                                                      batch_first=True, padding_value=-1).to(logits.device)  # fmt: skip
        ids = self.draw(logits, torch.tensor([len(s) for s in self.sequences]), history).tolist()
        raise_found(logits)
        self.note(ids)
        return ids
