from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyllm.engine import reading
from pyllm.engine.beams import Beam, search
from pyllm.engine.budget import new_pool
from pyllm.engine.bursts import Bursts
from pyllm.engine.chunks import Chunks
from pyllm.engine.decoding import AT_ONCE
from pyllm.engine.draft import new_speculation
from pyllm.engine.draws import Draws
from pyllm.engine.generation import (
    TextStream,
    most_tokens,
    prompt_ids,
    stop_texts,
    warn_of_unheeded,
)
from pyllm.engine.hooks import Hooks, Replacement
from pyllm.engine.pieces import Piece, batches, pieces, unit
from pyllm.engine.reading import Score
from pyllm.engine.request import Request
from pyllm.engine.sampling import SamplingParams
from pyllm.engine.speculation import rows_of
from pyllm.engine.steps import Steps
from pyllm.engine.watch import Watch
from pyllm.engine.whole import whole, whole_ids
from pyllm.models import Model
from pyllm.runtime import raise_found
from pyllm.text import Tokenizer


class Engine:
    """Runs many requests over one model together, each with the bits that it has alone.

    A step of the engine reads so many ids of prompts and draws the next id of each sequence whose prompt is read, so
    that long prompts do not hold up the others. A request is admitted, by priority and then in order, when there is
    room for all that it may come to need: what is admitted can always end, and memory never grows beyond what was set.
    Prompts that begin as an earlier one did take over what is known of it: pages of 64 ids, the last of them as far as
    it is the same, or, of a recurrent model, what had been read at the end of a piece.

    Whoever waits for a result makes the steps: `generate`, `stream` and `astream` may be called from several threads at
    once, and their requests run together. The model is put into evaluation mode.

    Args:
        model: a model with an attention or recurrent state, or an encoder-decoder, whose prompts are answered.
        tokenizer: for prompts and results that are texts; without one they are ids.
        max_sequences: how many run together.
        max_length: the longest sequence that room is set aside for; the model's context by default.
        num_pages: the budget: pages of 64 positions of all layers' keys and values; by default what `max_sequences`
            sequences of `max_length` need. Of a recurrent model each sequence needs one slot, and as many more keep
            beginnings; of an encoder-decoder pages for what is answered too, which those who answer the same share.
        kv_cache_memory_bytes: the budget in bytes, in place of num_pages.
        kv_cache_dtype: "auto" keeps keys and values in the model's dtype, "int8" in 8 bits with a scale for 32 numbers,
            see `ops.write_pages`: nearly half the memory of bfloat16, with bits of its own, which depend on others, on
            pieces and on threads no more than those of "auto". For models with attention.
        chunk: how many ids of prompts are read in a step.
        reuse_prefixes: whether prompts take over what is known of their beginnings.
        speculate: "lookup", or a smaller model with the same vocabulary, a draft: what they propose is read together
            with a sequence's last id, and the ids that come of it are those that plain decoding draws. Proposed is what
            pays, by how many stood before. For models with attention.
        clock: the seconds by which requests time out.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer | None = None, *, max_sequences: int = 32,
                 max_length: int | None = None, num_pages: int | None = None,
                 kv_cache_memory_bytes: int | None = None, kv_cache_dtype: str = "auto", chunk: int = 256,
                 reuse_prefixes: bool = True, speculate: str | Model | None = None,
                 clock: Callable[[], float] = time.monotonic):  # fmt: skip
        for name, value in (("max_sequences", max_sequences), ("max_length", max_length), ("num_pages", num_pages),
                            ("kv_cache_memory_bytes", kv_cache_memory_bytes), ("chunk", chunk)):  # fmt: skip
            if value is not None and whole(name, value) < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}")
        self.model, self.tokenizer, self.max_sequences, self.chunk = model, tokenizer, max_sequences, chunk
        self.pool = new_pool(model, max_sequences, num_pages, max_length, reuse_prefixes, kv_cache_dtype,
                             kv_cache_memory_bytes)  # fmt: skip
        self._waiting: list[tuple[float, int, Request]] = []
        self._running: list[Request] = []
        self._speculation = None if speculate is None else new_speculation(model, self.pool, speculate, max_sequences)
        self.steps = Steps(model, self.pool, self._speculation.rows if self._speculation else max_sequences)
        self._chunks = Chunks(self.steps, self.pool, unit(chunk))
        self._bursts = Bursts(self.steps, max_sequences)
        self._draws, self._watch = Draws(), Watch(model)
        self._clock = clock
        self._order, self.lock = itertools.count(), threading.RLock()

    def submit(self, prompt: str | Sequence[int], params: SamplingParams | None = None, *,
               max_tokens: int | None = None, stop: str | Sequence[str] = (), stop_ids: Sequence[int] = (),
               priority: int = 0, timeout: float | None = None, n: int = 1,
               on_token: Callable[[int, str], Any] | None = None, capture: Sequence[str] = (),
               replace: Mapping[str, Replacement] | None = None) -> Request:  # fmt: skip
        """Queues a prompt, a text or ids.

        Args:
            params: how its ids are drawn.
            max_tokens: how many at most; by default 256, or what fits the model's context.
            stop: texts that end it, and that are not part of it. The tokenizer's end-of-text ids always end it.
            stop_ids: ids that end it, beside the model's own.
            priority: the higher goes first.
            timeout: seconds after which it ends, wherever it is.
            n: how many continuations are drawn; `samples` of the request has them all, itself first. Each is that of a
                request of its own, whose seed is that of the one before and 1, but the prompt is read once.
            on_token: is called with each id and the text that became final with it; what it raises ends the request. It
                is for one continuation.
            capture: names of modules, as in `model.named_modules()`; the request's `captured` has what they give, after
                replacement: of a block the stream behind it, of others their output, or the first of several. Of an
                encoder-decoder, those of its decoder. For one continuation, as is `replace`.
            replace: by the names of modules, functions of what they give for some positions of this request,
                (positions, ...), and those positions, a range; what they return goes on in its place. One that raises
                ends the request.

        Raises:
            ValueError, TypeError: no prompt, or a setting that does not fit. A prompt that is too long for the model or
            the budget is no such error: the request ends with it.
        """
        warn_of_unheeded(self.model)
        stops = stop_texts(stop)
        if stops and self.tokenizer is None:
            raise TypeError("an engine without a tokenizer must get no stop texts")
        end = () if self.tokenizer is None else tuple(self.tokenizer.eos_ids)
        ids = self.encode(prompt)
        max_tokens = most_tokens(self.model, len(ids), max_tokens)
        source, ids = (ids, list(self.model.start_ids)) if self.model.answers else ([], ids)
        if whole("n", n) < 1:
            raise ValueError(f"n must be at least 1, but got {n}")
        if n > 1 and on_token is not None:
            raise TypeError(f"on_token must be for one continuation, but n is {n}")
        if n > 1 and (capture or replace):
            raise TypeError(f"capture and replace must be for one continuation, but n is {n}")
        hooks = Hooks(self.model, capture, replace or {}) if capture or replace else None
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive, but got {timeout}")
        params = (params or SamplingParams()).with_seed()
        params.check()
        bias = params.bias(self.model.vocab_size)
        ends = self.model.stop_ids.union(whole_ids("a stop id", stop_ids), end)
        samples: list[Request] = []
        for own in params.spread(n):
            stream = None
            if self.tokenizer is not None:
                stream = TextStream(self.tokenizer, stops, () if source else ids, self.model.silent_ids)
            samples.append(Request(self, ids, own, bias, max_tokens, ends, stream, samples, on_token, source, hooks))
        for request in samples:
            request.deadline = math.inf if timeout is None else self._clock() + timeout
            self.queue(request, priority)
        return samples[0]

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[Request]:
        """Runs prompts to their ends; `options` as in `submit`, `params` for all or one for each."""
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"params must be one for all or {len(prompts)}, but got {len(params)}")
        requests: list[Request] = []
        try:
            for prompt, own in zip(prompts, params, strict=True):
                requests.append(self.submit(prompt, own, **options))
            for request in requests:
                while any(sample.reason is None for sample in request.samples):
                    self.step(AT_ONCE)
        finally:  # an interruption leaves nothing behind
            for request in requests:
                for sample in request.samples:
                    sample.cancel()
        return requests

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None,
               **options: Any) -> Iterator[str]:  # fmt: skip
        """The pieces of one prompt's text, as they become final. Raises what ended the request, if an error did."""
        request = self.submit(prompt, params, **_for_one(options))
        try:
            while request.reason is None or request.pieces:
                if request.pieces:
                    yield request.pieces.popleft()
                else:
                    self._advance(request)
            if request.error is not None:
                raise request.error
        finally:
            request.cancel()

    async def astream(self, prompt: str | Sequence[int], params: SamplingParams | None = None,
                      **options: Any) -> AsyncIterator[str]:  # fmt: skip
        """As `stream`, in an event loop: steps are made in its threads."""
        request = self.submit(prompt, params, **_for_one(options))
        try:
            while request.reason is None or request.pieces:
                if request.pieces:
                    yield request.pieces.popleft()
                else:
                    await asyncio.get_running_loop().run_in_executor(None, self._advance, request)
            if request.error is not None:
                raise request.error
        finally:
            request.cancel()

    def score(self, texts: Sequence[str | Sequence[int]], params: SamplingParams | None = None, *,
              sources: Sequence[str | Sequence[int]] | None = None) -> list[Score]:  # fmt: skip
        """The log-probabilities of texts, under the logits and under what `params` make of them: the same bits as when
        their ids are drawn. Texts are read in pieces, like prompts, among all requests.

        Args:
            sources: of an encoder-decoder, what the texts answer, one each; their scores are of all of their ids.

        Raises:
            ValueError, TypeError: no ids, or more than the model's context or the pages hold; a setting out of bounds;
                sources that are missing, or of no use.
            IndexError: an id outside the vocabulary.
        """
        return reading.score(self, texts, params or SamplingParams(), sources)

    def embed(self, texts: Sequence[str | Sequence[int]], *, pooling: str = "mean",
              normalize: bool = True) -> Tensor:  # fmt: skip
        """One vector a text, (texts, hidden), float32, of those that the model's head would read or, of an
        encoder-decoder, of its encoder's. A text has the same bits alone or among others.

        Args:
            pooling: "mean" of a text's vectors, or the "last" of them, which has seen all of the text.
            normalize: makes them of length 1.

        Raises:
            ValueError, TypeError, IndexError: as in `score`, or another pooling.
        """
        return reading.embed(self, texts, pooling, normalize)

    def beam_search(self, prompt: str | Sequence[int], num_beams: int | None = None, *, max_tokens: int | None = None,
                    length_penalty: float | None = None, early_stopping: bool | str | None = None,
                    stop_ids: Sequence[int] = ()) -> list[Beam]:  # fmt: skip
        """The `num_beams` best continuations that a beam search finds, the best first, among all requests.

        What is not given is as the model's checkpoint asks for or, if it does not, 4 beams, 1.0 and False.

        Args:
            length_penalty: scores are sums of log-probabilities divided by the number of ids to this power.
            early_stopping: True ends when as many have ended as there are beams; False also when the best that goes
                on is worse than all of them, by its score so far; "never" by the best score that it can come to.

        Raises:
            ValueError, TypeError: no prompt, a setting out of its bounds, or beams that do not fit the model's context,
            vocabulary or the engine's sequences or pages.
            IndexError: an id outside the vocabulary.
        """
        return search(self, prompt, num_beams, max_tokens, length_penalty, early_stopping, stop_ids)

    @torch.no_grad()
    def step(self, seconds: float = 0.0) -> None:
        """Admits who is next, reads a piece of prompts, and draws an id for each sequence whose prompt is read.

        Args:
            seconds: more ids are drawn for about so long, until a sequence ends, unless prompts are being read and
                nobody waits for a place. What others ask for meanwhile waits.
        """
        with self.lock:
            self.look_at_model()
            try:
                self._time_out()
                self._admit()
                left = self.chunk
                reading = [r for r in self._running if not r.decodes]
                for request in reading:
                    if left > 0 and request.reason is None and request.encodes:
                        left -= self._encode(request, left)
                unread = [r for r in reading if r.reason is None and not r.decodes and not r.encodes]
                for batch in batches(list(pieces(unread, left, self._chunks.unit)), self.model.context_length):
                    self._read(batch)
                if reading:
                    self._admit()  # samples of a prompt that has just been read
                    # Who has just drawn an id goes on in the next step, so that it can be heard of. While others wait
                    # for a place, what counts is how soon sequences end; else, how soon prompts are read.
                    decoding = [r for r in self._running if r.decodes and not (r.ids and r in reading)]
                    self._decode(decoding, seconds if self._waiting else 0.0)
                else:  # whoever waits does so until a sequence ends
                    self._decode(list(self._running), seconds)
            except BaseException:  # an interruption: whoever goes on does so from what is noted
                self.steps.clear()
                if self._speculation is not None:
                    self._speculation.reset(self._running)
                for request in list(self._running):
                    if request.begins_again:
                        self._running.remove(request)
                        self.pool.give(request.held)
                        request.held = None
                        self.queue(request, math.inf)
                    else:
                        self.pool.reset(request.held, len(request.sequence) - 1)
                raise

    def end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """Ends a request, unless it has ended, and frees what it holds."""
        with self.lock:
            if request.reason is not None:
                return
            request.finish(reason, error)
            if self._speculation is not None:
                self._speculation.proposer.end(request)
            if request.held is not None:
                self._running.remove(request)
                self.pool.give(request.held, request.sequence)

    def encode(self, text: str | Sequence[int], answer: bool = False) -> list[int]:
        """The ids of a prompt, or of an answer to one.

        Raises:
            ValueError, TypeError: there are none.
        """
        if not isinstance(text, str):
            ids = whole_ids("an id", text)
        elif self.tokenizer is None:
            raise TypeError("an engine without a tokenizer must get ids")
        elif answer:
            ids = getattr(self.tokenizer, "targets", self.tokenizer).encode_framed(text)[0]
        else:
            ids = prompt_ids(self.model, self.tokenizer, text)
        if not ids:
            raise ValueError("a prompt must have at least one id")
        return ids

    def queue(self, request: Request, priority: float = 0) -> None:
        """Puts a request where it waits for its turn, unless it is too long for that."""
        limits = (("the model's context", self.model.context_length, request.length),
                  ("the engine's max_length", self.pool.longest, request.length),
                  ("the engine's pages", self.pool.most, request.positions + request.source_positions))  # fmt: skip
        for name, most, needed in limits:
            if most is not None and needed > most:
                return request.finish("error", ValueError(f"{request} do not fit {name} of {most}"))
        with self.lock:
            heapq.heappush(self._waiting, (-priority, next(self._order), request))

    def _advance(self, request: Request) -> None:
        """Makes a step for who waits for a piece of a request's text, unless another's step has brought one."""
        with self.lock:
            if request.reason is None and not request.pieces:
                self.step(AT_ONCE)

    def look_at_model(self) -> None:
        """Before a step: what was known of another model is forgotten."""
        if self.model.training:
            self.model.eval()
        if not self._running and self._watch.changed():
            self.steps.forget()
            self._chunks.forget()
            self.pool.forget()

    def _time_out(self) -> None:
        now = self._clock()
        for request in [r for r in itertools.chain(self._running, (w[2] for w in self._waiting)) if r.deadline <= now]:
            self.end(request, "timeout")

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_sequences:
            request = self._waiting[0][2]
            if request.reason is None:
                first, before = request.samples[0], len(request.prompt) - 1
                if first.held is not None and first.reason is None and first is not request:
                    if first.held.length < before:  # what it reads is for both
                        return
                    request.held = self.pool.fork(first.held, before)
                if request.held is None:
                    request.held = self.pool.admit(request.known, request.positions, request.source)
                if request.held is None:
                    return
                request.held.private = request.hooks is not None
                self._running.append(request)
            heapq.heappop(self._waiting)

    def _encode(self, request: Request, most: int) -> int:
        """Reads what a request answers, and with it what others do, up to so many ids; says how many that were."""
        sources = [request.held.source]
        for other in [r.held.source for r in self._running if r.encodes]:
            longest = max(len(s.ids) for s in (*sources, other))
            if other not in sources and (len(sources) + 1) * longest <= most:
                sources.append(other)
        try:
            self.pool.read(sources)
            return len(sources) * max(len(s.ids) for s in sources)
        except Exception as error:
            if len(sources) > 1:  # each alone, so that one does not end the others
                return self._encode(request, 0)
            for reader in [r for r in self._running if r.held.source is request.held.source]:
                self.end(reader, "error", error)
            return len(request.source)

    def _read(self, batch: list[Piece]) -> None:
        """Reads pieces of sequences in one call of the model."""
        batch = [piece for piece in batch if piece.request.reason is None]  # a callback may have ended it
        if not batch:
            return
        requests, firsts, ends = [p.request for p in batch], [p.first for p in batch], [p.end for p in batch]
        try:
            hidden = self._chunks(batch)
            raise_found(hidden)
        except Exception as error:
            if len(batch) == 1:
                return self.end(requests[0], "error", error)
            for piece in batch:  # each alone, so that one does not end the others
                self._read([piece])
            return
        drawing: list[tuple[Request, Tensor]] = []
        for request, own, first, end in zip(requests, hidden.split(1), firsts, ends, strict=True):
            if request.reason is not None:  # a hook has ended it
                continue
            self.pool.note(request.held, request.sequence[:end], end)
            try:
                last = request.read(self.model, own[:, : end - first], first)
            except Exception as error:
                self.end(request, "error", error)
            else:
                if last is not None:
                    drawing.append((request, last))
                elif end == len(request.sequence):
                    self.end(request, "stop")
        self._draw_first(drawing)

    def _draw_first(self, drawing: list[tuple[Request, Tensor]]) -> None:
        """Draws the first ids of requests, after the last vectors of their prompts."""
        if not drawing:
            return
        rows = [request for request, _ in drawing]
        try:
            logits = self.model.head(torch.cat([last for _, last in drawing]))
        except Exception as error:
            if len(rows) == 1:
                return self.end(rows[0], "error", error)
            for one in drawing:
                self._draw_first([one])
            return
        self._draw(rows, logits, Draws())

    def _decode(self, rows: list[Request], seconds: float = 0.0) -> None:
        if not rows:
            return
        proposed = {} if self._speculation is None else self._speculation.propose(rows)
        if proposed and self._decode_ahead(rows, proposed):
            return
        rows = self.steps.place(rows)
        try:
            drawn, logits = self._bursts(rows, seconds, self._speculation.steps if self._speculation else None)
        except Exception as error:
            if len(rows) == 1:
                return self.end(rows[0], "error", error)
            for row in rows:  # each alone, so that one does not end the others
                if row.reason is None:
                    self._decode([row])
            return
        if drawn[0][0]:
            self.pool.advance(rows, [own[0] for own in drawn])
            for row, own in zip(rows, drawn, strict=True):
                self._push(row, own)
        if logits is not None:
            left = [i for i, row in enumerate(rows) if row.reason is None]
            if len(left) < len(rows):
                rows, logits = [rows[i] for i in left], logits[left]
            self.pool.advance(rows)
            self._draw(rows, logits, self._draws)

    def _decode_ahead(self, rows: list[Request], proposed: dict[Request, list[int]]) -> bool:
        """A step that reads what is proposed, too. False if it fails: what is at fault may never be drawn."""
        assert self._speculation is not None
        flat = self.steps.place(rows_of(rows, proposed))
        try:
            found = iter([t.tolist() for t in Draws()(flat, self.constrained(flat, self.steps.run()))])
        except Exception:
            for row in proposed:
                self._speculation.learn(row, proposed[row], [], len(rows))
            return False
        drawn = zip(*found, strict=True)
        for row in rows:
            ids = proposed.get(row, [])
            own = list(itertools.islice(drawn, len(ids) + 1))
            stood = self._speculation.learn(row, ids, [i for i, *_ in own], len(rows))
            self._push(row, list(map(list, zip(*own[: stood + 1], strict=True))))
            if row.reason is None:
                self.pool.note(row.held, row.sequence, len(row.sequence) - 1)
        return True

    def _draw(self, rows: list[Request], logits: Tensor, draws: Draws) -> None:
        try:
            sample = draws(rows, self.constrained(rows, logits))
        except Exception as error:
            if len(rows) == 1:
                return self.end(rows[0], "error", error)
            for i, row in enumerate(rows):
                self._draw([row], logits[i : i + 1], Draws())
            return
        for row, *drawn in zip(rows, *(t[:, None].tolist() for t in sample), strict=True):
            self._push(row, drawn)

    def _push(self, row: Request, drawn: Sequence[list[Any]]) -> None:
        if row.reason is not None:  # what a callback ended
            return
        try:
            reason = row.push(*drawn)
        except Exception as error:
            self.end(row, "error", error)
        else:
            if reason is not None:
                self.end(row, reason)

    def constrained(self, rows: list[Request], logits: Tensor) -> Tensor:
        if type(self.model).constrain is Model.constrain:
            return logits
        return torch.cat([self.model.constrain(own, len(row.sequence) - len(row.prompt), row.max_tokens)
                          for row, own in zip(rows, logits.split(1), strict=True)])  # fmt: skip


def _for_one(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("n", 1) != 1:
        raise TypeError(f"a stream must be of one continuation, but n is {options['n']}")
    return options
