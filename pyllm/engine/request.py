from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyllm.engine.generation import TextStream
from pyllm.engine.hooks import Hooks
from pyllm.engine.sampling import SamplingParams
from pyllm.models import Model
from pyllm.nn.state import PAGE_SIZE

if TYPE_CHECKING:
    from pyllm.engine.engine import Engine


class Request:
    """A prompt that an `Engine` continues, and what has become of it.

    Attributes:
        prompt, ids: the prompt's ids, and those generated so far.
        source: of an encoder-decoder, the ids that are answered; `prompt` is then what answers begin with.
        text: what they say, without a stop text; final where `reason` is set. Empty without a tokenizer.
        logprobs, processed_logprobs: of each of `ids`, as in `ops.Sample`.
        reason: None while it waits or runs, then "stop" (an id or text that ends it), "length" (`max_tokens`),
            "cancelled", "timeout", or "error", with the `error`.
        captured: of the modules that were to be captured, (positions, ...) each: what they gave for all that is read.
        samples: all continuations of the prompt that were submitted together, in the order of their seeds.
    """

    begins_again = False  # after a step that was broken off
    ahead = 0  # a row that reads its last id stands at the end of what it holds

    def __init__(self, engine: Engine, prompt: list[int], params: SamplingParams, bias: Tensor | None, max_tokens: int,
                 stop_ids: frozenset[int], stream: TextStream | None, samples: list[Request],
                 on_token: Callable[[int, str], Any] | None, source: Sequence[int] = (),
                 hooks: Hooks | None = None):  # fmt: skip
        self.source, self.hooks = source, hooks
        self.prompt, self.params, self.bias, self.max_tokens = prompt, params, bias, max_tokens
        self.samples, self.deadline = samples, math.inf
        self.ids: list[int] = []
        self.sequence = list(prompt)  # and ids
        self.text = ""
        self.logprobs: list[float] = []
        self.processed_logprobs: list[float] = []
        self.reason: str | None = None
        self.error: Exception | None = None
        self.pieces: deque[str] = deque()  # of the text, that nobody has taken yet
        self.held: Any = None  # of the engine's pool
        self.luck: Any = None  # with what was proposed for it
        self.guess: Any = None  # what the proposer keeps of it
        self._engine, self.stop_ids, self._stream, self._on_token = engine, stop_ids, stream, on_token

    def cancel(self) -> None:
        """Ends it here, and frees what it holds."""
        self._engine.end(self, "cancelled")

    def __str__(self) -> str:
        return f"a prompt of {len(self.source or self.prompt)} tokens and {self.max_tokens} more"

    @property
    def positions(self) -> int:
        """How many it may come to have in the model's state: its last id is never read."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def source_positions(self) -> int:
        """How many its source takes of the pool: whole pages."""
        return -(-len(self.source) // PAGE_SIZE) * PAGE_SIZE

    @property
    def length(self) -> int:
        """How many ids it may come to have, of the source or of the answer where there is a source."""
        return max(len(self.source), self.max_tokens) if self.source else len(self.prompt) + self.max_tokens

    @property
    def known(self) -> Sequence[int]:
        """The ids of which the keys and values may be those of another request."""
        return self.prompt if self.hooks is None else ()

    @property
    def decodes(self) -> bool:
        """Whether all but its last id is read, and that may be read in a row of a step."""
        if self.held.length != len(self.sequence) - 1 or self.hooks is not None:
            return False
        return not self.source or self.held.source.read

    @property
    def encodes(self) -> bool:
        """Whether its source is still to be read."""
        return bool(self.source) and not self.held.source.read

    @property
    def captured(self) -> dict[str, Tensor]:
        return {} if self.hooks is None else self.hooks.captured

    def watching(self, first: int, count: int) -> AbstractContextManager[None]:
        """What is to be done while the model reads so many of its ids, from the first-th on."""
        return nullcontext() if self.hooks is None else self.hooks.watching(first, count)

    def read(self, model: Model, hidden: Tensor, first: int) -> Tensor | None:
        """Takes the vectors (1, T, hidden) of ids from the first-th on; if they are the last, gives that (1, hidden)
        from which comes what is next."""
        return hidden[:, -1] if first + hidden.shape[1] == len(self.sequence) else None

    def push(self, ids: list[int], logprobs: list[float], processed_logprobs: list[float]) -> str | None:
        """Takes the next ids, of which only the last can be a stop id; the reason if one of them ends it. None is taken
        after that."""
        if self._stream is None and self._on_token is None:
            self._take(ids, logprobs, processed_logprobs)
        else:
            for i, *of_it in zip(ids, logprobs, processed_logprobs, strict=True):
                self._take([i], *([x] for x in of_it))
                piece = "" if self._stream is None else self._stream.push(i)
                self._say(piece)
                if self._on_token is not None:
                    self._on_token(i, piece)
                if self.reason is not None:  # the callback has ended it
                    return None
                if self._stream is not None and self._stream.ended:
                    return "stop"
        if self.ids[-1] in self.stop_ids:
            return "stop"
        return "length" if len(self.ids) == self.max_tokens else None

    def _take(self, ids: list[int], logprobs: list[float], processed_logprobs: list[float]) -> None:
        self.ids += ids
        self.sequence += ids
        self.logprobs += logprobs
        self.processed_logprobs += processed_logprobs

    def finish(self, reason: str, error: Exception | None) -> None:
        if self._stream is not None:
            self._say(self._stream.finish())
        self.reason, self.error = reason, error

    def _say(self, piece: str) -> None:
        if piece:
            self.text += piece
            self.pieces.append(piece)
