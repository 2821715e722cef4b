from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Iterator, Sequence

import torch

from pyllm.engine.decoding import decode
from pyllm.engine.sampling import Sampler, SamplingParams
from pyllm.engine.whole import whole
from pyllm.models import Model
from pyllm.nn.evaluating import evaluating
from pyllm.ops.linear import reading_copies
from pyllm.text import Tokenizer

DEFAULT_MAX_TOKENS = 256


def prompt_ids(model: Model, tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that a model reads of a prompt: never none, where the tokenizer has one that ends a text."""
    ids = tokenizer.encode_framed(text)[0] if model.answers else tokenizer.encode(text)
    return ids or list(tokenizer.eos_ids[:1])


def stop_texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One or several.

    Raises:
        TypeError, ValueError: what is no text, or an empty one.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str):
            raise TypeError(f"stop must be a text or several, but got {text!r:.80}")
        if not text:
            raise ValueError("a stop text must not be empty")
    return stops


def most_tokens(model: Model, length: int, max_tokens: int | None) -> int:
    """How many are generated at most from a prompt of so many: `max_tokens`, by default 256 or what fits the model's
    context, and 1 where nothing does."""
    if max_tokens is None:
        room = model.room(length)
        return DEFAULT_MAX_TOKENS if room is None else min(DEFAULT_MAX_TOKENS, max(room, 1))
    max_tokens = whole("max_tokens", max_tokens)
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, but got {max_tokens}")
    return max_tokens


BEAMS = ("num_beams", "length_penalty", "early_stopping")  # settings of a checkpoint that beam search follows


def warn_of_unheeded(model: Model, heeded: Collection[str] = ()) -> None:
    """Warns where the model's checkpoint asks for another way of generating, such as beams."""
    asked = {name: value for name, value in model.unheeded.items() if name not in heeded}
    if asked:
        said = ", ".join(f"{name}={value!r:.80}" for name, value in asked.items())
        beams = "; num_beams=... or Engine.beam_search searches for beams" if "num_beams" in asked else ""
        warnings.warn(f"the model's checkpoint asks for {said} to generate, which is not done here{beams}",
                      stacklevel=3)  # fmt: skip


def generate_ids(model: Model, prompts: Sequence[Sequence[int]], params: SamplingParams | None = None, *,
                 max_tokens: int | None = None,
                 stop_ids: Sequence[int] = ()) -> Iterator[list[int | None]]:  # fmt: skip
    """Continues a batch of sequences of ids, or answers them, each as if it were alone: the plain loop, for a batch
    that begins and ends together. An `Engine`, whose requests come and go, draws the same ids.

    Yields, step by step, the next id of each sequence, or None for one that has ended with a stop id, also one
    of the model's own, or at max_tokens. What the model's checkpoint says of how to generate counts for nothing but
    the ids that begin and end an answer; a warning names what would need another way of generating, such as beams.

    Raises:
        ValueError: no prompt, an empty one, or more tokens than the model's context holds.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("each prompt must have at least one id")
    longest = max(len(p) for p in prompts)
    room, max_tokens = model.room(longest), most_tokens(model, longest, max_tokens)
    if room is not None and max_tokens > room:
        raise ValueError(f"a prompt of {longest} tokens and {max_tokens} more do not fit the model's context of "
                         f"{model.context_length}")  # fmt: skip
    warn_of_unheeded(model)
    return _steps(model, prompts, params or SamplingParams(), max_tokens, model.stop_ids.union(stop_ids))


@torch.no_grad()
def _steps(model, prompts, params: SamplingParams, max_tokens: int, stop_ids: frozenset[int]):
    with evaluating(model):
        # 1. All prompts at once, padded on the right.
        lengths = torch.tensor([len(p) for p in prompts], device=model.device)
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.as_tensor(p, dtype=torch.int64) for p in prompts], batch_first=True
        )
        state, ids, lengths = model.begin(ids.to(model.device), lengths, max_tokens)
        with reading_copies():
            hidden = model.hidden(ids, state, lengths)
            logits = model.head(hidden[torch.arange(len(prompts), device=model.device), lengths - 1])
        sample = Sampler(params, [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)])
        # 2. The first ids of all, then step by step; a sequence that has ended goes on in its row, unheard.
        drawn = sample(model.constrain(logits, 0, max_tokens))
        live = [True] * len(prompts)
        for step in itertools.chain([drawn], decode(model, state, sample, drawn, max_tokens, stop_ids)):
            yield [i if l else None for i, l in zip(step, live, strict=True)]
            live = [l and i not in stop_ids for i, l in zip(step, live, strict=True)]
            if not any(live):
                return


class TextStream:
    """Turns the ids that follow a prompt's into text, holding back what could still become part of a stop text."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), prompt: Sequence[int] = (),
                 silent_ids: Collection[int] = ()):  # fmt: skip
        self.decoder, self.eos_ids, self.stops = tokenizer.stream(prompt), tokenizer.eos_ids, stops
        self.silent_ids, self.held, self.ended = silent_ids, "", False

    def push(self, i: int) -> str:
        if i in self.eos_ids:
            return self.finish()
        return "" if i in self.silent_ids else self._pass(self.decoder.push(i))

    def finish(self) -> str:
        """What is left when no more ids come."""
        if self.ended:
            return ""
        text = self._pass(self.decoder.flush())
        return text if self.ended else self._end(text + self.held)

    def _pass(self, piece: str) -> str:
        text = self.held + piece
        found = [at for s in self.stops if (at := text.find(s)) >= 0]
        if found:
            return self._end(text[: min(found)])
        keep = max((n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _end(self, text: str) -> str:
        self.held, self.ended = "", True
        return text
