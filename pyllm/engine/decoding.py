from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from pyllm.engine.capture import Captured
from pyllm.engine.recording import NotRecordable, Recording
from pyllm.engine.sampling import Sampler
from pyllm.models import Model
from pyllm.nn.evaluating import evaluating

AT_ONCE = 0.03  # seconds of steps that are run in one call, so that a text still streams and Ctrl-C is heard


def decode(model: Model, state: Any, sample: Sampler, drawn: list[int], max_tokens: int,
           stop_ids: Collection[int]) -> Iterator[list[int]]:  # fmt: skip
    """Draws what follows the first `drawn` ids of a batch, up to `max_tokens` of them with those, step by step.

    The step is recorded and replayed where it can be, and else run as it is; the ids are the same. Ends early when each
    sequence has drawn a stop id. Runs without gradients.
    """
    if max_tokens == 1:
        return
    ids = torch.tensor(drawn, device=model.device)[:, None]
    if ids.is_cuda:
        yield from _captured(model, state, sample, ids, max_tokens)
        return
    ended = torch.tensor([i in stop_ids for i in drawn])
    whole = type(model).constrain is Model.constrain and not sample.params.looks_back
    positions = torch.tensor([len(s) for s in sample.sequences])
    try:
        with Recording() as program:
            logits = model.head(model.hidden(ids, state)[:, 0])
            if whole:
                ids[:, 0] = sample.draw(logits, positions)
                positions += 1
    except NotRecordable:
        yield from _unrecorded(model, state, sample, ids, max_tokens)
        return
    if whole:
        yield from _many_at_once(program, sample, ids[:, 0].view(-1), ended, max_tokens - 1, stop_ids)
        return
    for step in range(1, max_tokens):
        program.run()
        drawn = sample(model.constrain(logits, step, max_tokens))
        ids[:, 0] = torch.tensor(drawn)
        yield drawn


def _unrecorded(model, state, sample, ids, max_tokens):
    for step in range(1, max_tokens):
        drawn = sample(model.constrain(model.head(model.hidden(ids, state)[:, 0]), step, max_tokens))
        ids = torch.tensor(drawn, device=ids.device)[:, None]
        yield drawn


def _captured(model: Model, state: Any, sample: Sampler, ids: Tensor, max_tokens: int) -> Iterator[list[int]]:
    """On a CUDA device: the first step as it is, the others as a CUDA graph, where they can be one."""

    def step() -> Tensor:
        return model.head(model.hidden(ids, state)[:, 0])

    logits, graph = step(), None
    for n in range(1, max_tokens):
        drawn = sample(model.constrain(logits, n, max_tokens))
        ids[:, 0] = torch.tensor(drawn)
        yield drawn
        if n == 1 and max_tokens > 2:
            with contextlib.suppress(NotRecordable):
                graph = Captured(step, [], ids.device)
        if n + 1 == max_tokens:
            return
        if graph is None:
            logits = step()
        else:
            graph.run()
            logits = graph.out


def _many_at_once(program, sample, ids: Tensor, ended: Tensor, steps: int, stop_ids: Collection[int]):
    count = 1
    while steps and not ended.all():
        drawn = torch.empty(min(count, steps), len(ids), dtype=torch.int64)
        error, began = None, time.perf_counter()
        try:
            program.generate(None, [ids], [drawn], ended, list(stop_ids), False)
        except Exception as e:  # what came before it stands
            error = e
        took = (time.perf_counter() - began) / max(program.steps_done, 1)
        for row in drawn[: program.steps_done].tolist():
            sample.note(row)
            yield row
        if error is not None:
            raise error
        steps -= program.steps_done
        count = max(1, min(2 * count, int(AT_ONCE / max(took, 1e-6))))


@torch.no_grad()
def why_unrecorded(model: Model) -> str | None:
    """What keeps the model's step from being recorded, so that it decodes more slowly; None if nothing does."""
    try:
        with evaluating(model):
            ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
            state, _, _ = model.begin(ids, torch.ones_like(ids[0]), 2)

            def step() -> Tensor:
                return model.head(model.hidden(ids, state)[:, 0])

            if ids.is_cuda:
                step()
                Captured(step, [], ids.device)
            else:
                with Recording():
                    step()
    except NotRecordable as reason:
        return str(reason)
    return None
