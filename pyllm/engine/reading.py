"""Texts that an engine reads, and does not go on with: their scores, their embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyllm import ops
from pyllm.engine.request import Request
from pyllm.engine.sampling import SamplingParams
from pyllm.models import Model

if TYPE_CHECKING:
    from pyllm.engine.engine import Engine

POOLINGS = ("mean", "last")
ROWS = 64  # of logits that are held at once


class Score(NamedTuple):
    """What a model thinks of a text: of each id but the first, given those before it, (ids - 1,) each.

    Attributes:
        ids: those of the text, (ids,), int64.
        logprobs, processed_logprobs: float32, as in `ops.Sample`; processed is -infinity where the settings leave an id
            no chance.
        first_choices: whether the id is the one with the largest logit.
    """

    ids: Tensor
    logprobs: Tensor
    processed_logprobs: Tensor
    first_choices: Tensor


class Reading(Request):
    """All of its ids are read, also those of a beginning that is known, by pieces; then it ends."""

    known: tuple[int, ...] = ()
    decodes, begins_again = False, True

    def __init__(self, engine: Engine, ids: list[int], params: SamplingParams):
        bias = params.bias(engine.model.vocab_size)
        super().__init__(engine, ids, params, bias, 1, frozenset(), None, [], None)
        self.samples.append(self)

    @property
    def length(self) -> int:
        return len(self.prompt)


class Scoring(Reading):
    """Collects the score of a text, whose last id is not read."""

    def __init__(self, engine: Engine, ids: list[int], params: SamplingParams):
        super().__init__(engine, ids[:-1] or ids, params)
        self.text_ids = torch.tensor(ids)

    def read(self, model: Model, hidden: Tensor, first: int) -> None:
        if first == 0:
            self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        last = min(first + hidden.shape[1], len(self.text_ids) - 1)
        for begin in range(first, last, ROWS):
            end = min(begin + ROWS, last)
            self.parts.append(self._scored(model.head(hidden[0, begin - first : end - first]), begin, end))

    def _scored(self, logits: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        given, history = self.text_ids[begin + 1 : end + 1], None
        if self.params.looks_back:
            history = self.text_ids[:end].repeat(end - begin, 1)
            history.masked_fill_(torch.arange(end) > torch.arange(begin, end)[:, None], -1)
        sample = ops.sample(logits, seeds=0, positions=0, given=given, history=history, logit_bias=self.bias,
                            **self.params.settings())  # fmt: skip
        return sample.logprobs, sample.processed_logprobs, logits.argmax(-1) == given

    @property
    def score(self) -> Score:
        empty = (torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.bool))
        return Score(self.text_ids, *(torch.cat(parts) for parts in zip(empty, *self.parts, strict=True)))


class Embedding(Reading):
    """Makes one vector of the last layer's, added up in float64 and in order, which pieces do not change."""

    def __init__(self, engine: Engine, ids: list[int], pooling: str, normalize: bool):
        super().__init__(engine, ids, SamplingParams())
        self.pooling, self.normalize = pooling, normalize

    def read(self, model: Model, hidden: Tensor, first: int) -> None:
        rows = hidden[0].double()
        if self.pooling == "last":
            self.total = rows[-1]
        else:
            self.total = (rows if first == 0 else torch.cat([self.total[None], rows])).cumsum(0)[-1]

    @property
    def vector(self) -> Tensor:
        y = self.total if self.pooling == "last" else self.total / len(self.prompt)
        return (y / y.norm().clamp(min=1e-12) if self.normalize else y).float()
