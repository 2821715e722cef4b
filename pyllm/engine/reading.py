"""Texts that an engine reads, and does not go on with: their scores, their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyllm import ops
from pyllm.engine.request import Request
from pyllm.engine.sampling import SamplingParams
from pyllm.models import EncoderDecoder, Model
from pyllm.runtime import raise_found

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

    def __init__(self, engine: Engine, ids: list[int], params: SamplingParams, source: Sequence[int] = ()):
        bias = params.bias(engine.model.vocab_size)
        super().__init__(engine, ids, params, bias, 1, frozenset(), None, [], None, source)
        self.samples.append(self)

    def __str__(self) -> str:
        return f"the {len(self.source or self.prompt)} tokens of a text"

    @property
    def length(self) -> int:
        return max(len(self.source), len(self.prompt))


class Scoring(Reading):
    """Collects the score of a text, whose last id is not read."""

    def __init__(self, engine: Engine, ids: list[int], params: SamplingParams, source: Sequence[int] = ()):
        super().__init__(engine, ids[:-1] or ids, params, source)
        self.text_ids = torch.tensor(ids)

    def read(self, model: Model, hidden: Tensor, first: int) -> None:
        if first == 0:
            self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        last = min(first + hidden.shape[1], len(self.text_ids) - 1)
        for begin in range(first, last, ROWS):
            end = min(begin + ROWS, last)
            logits = model.head(hidden[0, begin - first : end - first])
            if type(model).constrain is not Model.constrain:
                most = len(self.text_ids) + 1  # more could follow
                rows = enumerate(logits.split(1), begin)
                logits = torch.cat([model.constrain(row, step, most) for step, row in rows])
            self.parts.append(self._scored(logits, begin, end))

    def _scored(self, logits: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        given, history = self.text_ids[begin + 1 : end + 1].to(logits.device), None
        if self.params.looks_back:
            history = self.text_ids[:end].repeat(end - begin, 1)
            history.masked_fill_(torch.arange(end) > torch.arange(begin, end)[:, None], -1)
            history = history.to(logits.device)
        bias = None if self.bias is None else self.bias.to(logits.device)
        sample = ops.sample(logits, seeds=0, positions=0, given=given, history=history, logit_bias=bias,
                            **self.params.settings())  # fmt: skip
        raise_found(logits)
        return sample.logprobs.cpu(), sample.processed_logprobs.cpu(), (logits.argmax(-1) == given).cpu()

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
        return (y / y.norm().clamp(min=1e-12) if self.normalize else y).float().cpu()


def score(engine: Engine, texts: Sequence[str | Sequence[int]], params: SamplingParams,
          sources: Sequence[str | Sequence[int]] | None) -> list[Score]:  # fmt: skip
    model = engine.model
    if (sources is not None) != model.answers:
        raise TypeError(f"sources must be given for an encoder-decoder alone, but got {sources!r:.80}")
    if sources is not None and len(sources) != len(texts):
        raise ValueError(f"sources must be {len(texts)}, one for each text, but got {len(sources)}")
    if sources is None:
        readings = [Scoring(engine, engine.encode(t), params) for t in texts]
    else:
        readings = [Scoring(engine, [*model.start_ids, *engine.encode(t, answer=True)], params, engine.encode(s))
                    for t, s in zip(texts, sources, strict=True)]  # fmt: skip
    _run(engine, readings)
    return [r.score for r in readings]


def embed(engine: Engine, texts: Sequence[str | Sequence[int]], pooling: str, normalize: bool) -> Tensor:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, but got {pooling!r}")
    readings = [Embedding(engine, engine.encode(t), pooling, normalize) for t in texts]
    if isinstance(engine.model, EncoderDecoder):
        with engine.lock, torch.no_grad():
            for r in readings:
                hidden = engine.model.eval().encode(torch.tensor([r.prompt], device=engine.model.device)).hidden
                raise_found(hidden)
                r.read(engine.model, hidden, 0)
    else:
        _run(engine, readings)
    vectors = [r.vector for r in readings]
    return torch.stack(vectors) if vectors else torch.empty(0, engine.model.head.in_features)


def _run(engine: Engine, readings: Sequence[Reading]) -> None:
    """Runs them to their ends; raises what ended one of them, if an error did."""
    try:
        for reading in readings:
            engine.queue(reading)
        for reading in readings:
            while reading.reason is None:
                engine.step()
            if reading.error is not None:
                raise reading.error
    finally:
        for reading in readings:
            reading.cancel()
