from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from typer import Option

from pyllm.cli.app import (
    Folder,
    MaxTokens,
    MinP,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    app,
    err,
    load,
    set_threads,
)
from pyllm.engine import Engine, SamplingParams
from pyllm.models import Model
from pyllm.text import Tokenizer

LONGEST = 4096  # tokens of a conversation, unless the context is shorter or --context says more


@app.command()
def chat(
    folder: Folder,
    system: Annotated[str | None, Option(help="What the model is told before all else.")] = None,
    template: Annotated[Path | None, Option(help="A chat template, in Jinja. Default: the checkpoint's.")] = None,
    context: Annotated[
        int | None,
        Option(help="Tokens of the conversation kept in mind. Default: the model's context, or 4096.", min=2),
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    threads: Threads = None,
):
    """Talk with a model, a line at a time. Ctrl-C ends an answer, Ctrl-D the conversation."""
    set_threads(threads)
    model, tokenizer = load(folder)
    if template is not None:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty=repetition_penalty, seed=seed)
    params.check()
    conversation = Conversation(model, tokenizer, params, system=system, context=context, max_tokens=max_tokens,
                                stop=stop or ())  # fmt: skip
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and called back
    while (line := _line()) is not None:
        if line.strip():
            _answer(conversation, line)


def _line() -> str | None:
    """The next line that the user writes; None at the end."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            sys.stdout.write("\n" if sys.stdin.isatty() else "")
            return None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            sys.stdout.write("\n")


def _answer(conversation: Conversation, line: str) -> None:
    try:
        with _interrupts() as pressed, contextlib.closing(conversation.say(line)) as pieces:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
                if pressed:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        err.print("\n(interrupted)")
        return
    except (ValueError, FloatingPointError) as e:
        err.print(f"pyllm: {' '.join(str(e).split())}", markup=False)
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    if conversation.forgotten:
        err.print(f"({conversation.forgotten} messages are forgotten, as the conversation no longer fits)")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C, which raises KeyboardInterrupt as ever: raised while an object is finalised,
    that is reported and lost."""
    pressed: list[int] = []

    def note(number, frame):
        pressed.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed  # somebody else's
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Conversation:
    """A conversation, of which a new turn reads only what earlier ones have not. Where it no longer fits `context`
    tokens, with a quarter of them or `max_tokens` for the answer, its oldest turns are forgotten, but never `system`.

    Raises:
        ChatTemplateError: the tokenizer has no template.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, params: SamplingParams | None = None, *,
                 system: str | None = None, context: int | None = None, max_tokens: int | None = None,
                 stop: Sequence[str] = ()):  # fmt: skip
        context = context or LONGEST
        self.context = context if model.context_length is None else min(context, model.context_length)
        self.tokenizer, self.params, self.max_tokens, self.stop = tokenizer, params, max_tokens, stop
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0
        self.engine = Engine(model, tokenizer, max_sequences=1, max_length=self.context)
        tokenizer.encode_chat([*self.system, {"role": "user", "content": "?"}])

    def say(self, content: str) -> Generator[str, None, None]:
        """The pieces of the answer. What was said of one that is broken off is kept; an error leaves no trace."""
        messages = [*self.messages, {"role": "user", "content": content}]
        first, ids = self._fitting(messages)
        most = min(self.max_tokens or self.context, self.context - len(ids))
        answer: list[str] = []
        try:
            for piece in self.engine.stream(ids, self.params, max_tokens=most, stop=self.stop):
                answer.append(piece)
                yield piece
        except Exception:
            raise
        except BaseException:
            self._keep(messages, first, answer)
            raise
        self._keep(messages, first, answer)

    def _keep(self, messages: list[dict[str, str]], first: int, answer: list[str]) -> None:
        self.messages = [*messages[first:], {"role": "assistant", "content": "".join(answer)}]
        self.forgotten += first

    def _fitting(self, messages: list[dict[str, str]]) -> tuple[int, list[int]]:
        """The first message that is kept, and the ids from there on."""
        room = self.context - min(self.max_tokens or self.context // 4, self.context // 2)
        for first in range(0, len(messages), 2):
            ids = self.tokenizer.encode_chat([*self.system, *messages[first:]])
            if len(ids) <= room:
                return first, ids
        raise ValueError(f"the message has {len(ids)} tokens, with what goes before it, but the conversation has room "
                         f"for {room}")  # fmt: skip
