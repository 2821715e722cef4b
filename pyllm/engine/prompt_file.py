"""A file of prompts, and one of what a model says to them, which can be gone on with after an interruption."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllm.checkpoint.files import check_plain, parse_json, short
from pyllm.engine.budget import pages_for
from pyllm.engine.decoding import AT_ONCE
from pyllm.engine.engine import Engine
from pyllm.engine.generation import most_tokens, prompt_ids
from pyllm.engine.request import Request
from pyllm.engine.sampling import SamplingParams
from pyllm.models import Model
from pyllm.text import Tokenizer
from pyllm.text.tokenizer import write_file

SETTINGS = tuple(f.name for f in dataclasses.fields(SamplingParams) if f.name not in ("logit_bias", "allowed_ids"))
WHOLE = ("top_k", "seed", "max_tokens")
IDENTITY = ("line", "id", "prompt", "messages")
KNOWN = (*IDENTITY[1:], "max_tokens", "stop", *SETTINGS)


class PromptFileError(ValueError):
    """A line that is malformed; the message names the file and the line."""


@dataclass
class Line:
    """One prompt: the number of its line, from 1 on, what the line says, and what it comes to."""

    number: int
    given: Mapping[str, Any]
    ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """What its answer repeats."""
        return {"line": self.number} | {k: self.given[k] for k in IDENTITY if k in self.given}


def answer_file(model: Model, tokenizer: Tokenizer, prompts: str | os.PathLike, out: str | os.PathLike,
                params: SamplingParams | None = None, *, max_tokens: int | None = None, stop: Sequence[str] = (),
                batch_size: int = 32,
                progress: Callable[[int, int], Any] | None = None) -> dict[str, int]:  # fmt: skip
    """Continues, or answers, the prompts of a JSONL file, `batch_size` at a time.

    Each line of `prompts` is an object with "prompt", a text, or "messages", a conversation for the tokenizer's chat
    template; and, if it likes, an "id", which no other line has, and its own "max_tokens", "stop" and settings as in
    `SamplingParams`, in place of those given here. A seed given here is that of the first line, and the lines after it
    count on from there, so that lines that ask for the same get answers of their own.

    What is said to each is written to `out` when it ends: its line's number, id and prompt, with "text", "reason" (see
    `Request`), "tokens", "seed" and, where there is one, "error". What `out` has already is not done again, but for a
    last line that was cut short, so that the same call goes on after an interruption. In the end `out` is in order.

    Args:
        progress: is called with how many lines are done, and how many there are.

    Returns:
        How many lines ended for each reason, also of those that were there.

    Raises:
        PromptFileError, a ValueError: a line that is malformed, or a line of `out` that belongs to other prompts.
            Nothing has been run then.
        OSError: a file that cannot be read or written.
    """
    prompts, out = Path(prompts), Path(out)
    if out.exists() and out.samefile(prompts):
        raise ValueError(f"prompts and out must be two files, but both are {out}")
    lines = read_prompts(prompts, model, tokenizer, params, max_tokens=max_tokens, stop=stop)
    done, size = read_answers(out, prompts, lines)
    waiting = [line for line in lines if line.number not in done]
    if waiting:
        with open(out, "ab", buffering=0) as file:
            file.truncate(size)
            if progress is not None:
                progress(len(done), len(lines))
            engine = Engine(model, tokenizer, max_sequences=batch_size, num_pages=_pages(model, waiting, batch_size))
            for line, request in _run(engine, waiting, 2 * batch_size):
                done[line.number] = answer = line.identity | _result(request)
                _write(file, _encoded(answer))
                if progress is not None:
                    progress(len(done), len(lines))
    ordered = b"".join(_encoded(done[number]) for number in sorted(done))
    if not out.exists() or ordered != out.read_bytes():
        write_file(out, ordered)
    return dict(Counter(answer["reason"] for answer in done.values()))


def read_prompts(path: Path, model: Model, tokenizer: Tokenizer, params: SamplingParams | None = None, *,
                 max_tokens: int | None = None, stop: Sequence[str] = ()) -> list[Line]:  # fmt: skip
    """The prompts of a file; see `answer_file`. Blank lines are none.

    Raises:
        PromptFileError: a line that is malformed.
    """
    params, lines = params or SamplingParams(), []
    ids: dict[Any, int] = {}
    for number, text in enumerate(path.read_bytes().split(b"\n"), 1):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            given = parse_json(text, where)
            check_plain(given, where)
            line = _line(number, given, model, tokenizer, params, max_tokens, stop)
        except (ValueError, TypeError) as e:
            message = str(e)
            raise PromptFileError(message if message.startswith(where) else f"{where}: {message}") from None
        if "id" in given and given["id"] in ids:
            raise PromptFileError(f"{where}: the id {short(given['id'])} is that of line {ids[given['id']]}")
        ids[given.get("id")] = number
        lines.append(line)
    return lines


def _line(number: int, given: dict[str, Any], model: Model, tokenizer: Tokenizer, params: SamplingParams,
          max_tokens: int | None, stop: Sequence[str]) -> Line:  # fmt: skip
    unknown = sorted(set(given) - set(KNOWN))
    if unknown:
        raise ValueError(f"must have no names but {', '.join(KNOWN)}, but has {short(unknown[0])}")
    if ("prompt" in given) == ("messages" in given):
        raise ValueError("must have either prompt or messages")
    if "id" in given and (isinstance(given["id"], bool) or not isinstance(given["id"], str | int)):
        raise TypeError(f"id must be a string or a whole number, but is {short(given['id'])}")
    for name in {"max_tokens", *SETTINGS} & set(given):
        kinds, kind = (int, "a whole number") if name in WHOLE else (int | float, "a number")
        if isinstance(given[name], bool) or not isinstance(given[name], kinds):
            raise TypeError(f"{name} must be {kind}, but is {short(given[name])}")
    stops = given.get("stop", list(stop))
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise TypeError(f"stop must be a text or a list of them, none empty, but is {short(given['stop'])}")
    seed = {} if params.seed is None else {"seed": params.seed + number - 1}
    own = dataclasses.replace(params, **(seed | {name: given[name] for name in SETTINGS if name in given}))
    own.check()
    ids = _ids(given, model, tokenizer)
    most = most_tokens(model, len(ids), given.get("max_tokens", max_tokens))
    return Line(number, given, ids, own, most, tuple(stops))


def _ids(given: Mapping[str, Any], model: Model, tokenizer: Tokenizer) -> list[int]:
    if "prompt" in given:
        if not isinstance(given["prompt"], str):
            raise TypeError(f"prompt must be a text, but is {short(given['prompt'])}")
        ids = prompt_ids(model, tokenizer, given["prompt"])
    else:
        messages = given["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise TypeError(f"messages must be a list of objects, but is {short(messages)}")
        ids = tokenizer.encode_chat(messages)
    if not ids:
        raise ValueError("the prompt has no ids")
    return ids


def read_answers(path: Path, prompts: Path, lines: Iterable[Line]) -> tuple[dict[int, dict[str, Any]], int]:
    """What a file of answers holds by line, and how many bytes of it are whole lines.

    Raises:
        PromptFileError: a line that is malformed, or no answer to its prompt.
    """
    if not path.exists():
        return {}, 0
    asked = {line.number: line for line in lines}
    done: dict[int, dict[str, Any]] = {}
    whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    for at, text in enumerate(whole.split(b"\n")[:-1], 1):
        where = f"{path}, line {at}"
        try:
            answer = parse_json(text, where)
        except ValueError as e:
            raise PromptFileError(str(e)) from None
        number = answer.get("line")
        line = asked.get(number) if type(number) is int else None
        if line is None or {k: answer[k] for k in IDENTITY if k in answer} != line.identity:
            raise PromptFileError(f"{where} is no answer to a line of {prompts}: give another file for the answers")
        if not all(isinstance(answer.get(k), str) for k in ("text", "reason")):
            raise PromptFileError(f"{where} must have text and reason, which are texts")
        if line.number in done:
            raise PromptFileError(f"{where} answers line {number} of {prompts} once more")
        done[line.number] = answer
    return done, len(whole)


def _pages(model: Model, lines: Iterable[Line], batch_size: int) -> int:
    """As many as the largest that may come together need."""
    needed = [pages_for(model, len(line.ids), line.max_tokens) for line in lines]
    return sum(sorted(needed)[-batch_size:])


def _run(engine: Engine, lines: Sequence[Line], ahead: int) -> Iterator[tuple[Line, Request]]:
    """Each line with what became of it, as they end; so many are with the engine."""
    coming = iter(lines)
    running: list[tuple[Line, Request]] = []
    try:
        while True:
            while len(running) < ahead and (line := next(coming, None)) is not None:
                request = engine.submit(line.ids, line.params, max_tokens=line.max_tokens, stop=line.stop)
                running.append((line, request))
            yield from [(line, request) for line, request in running if request.reason is not None]
            running = [entry for entry in running if entry[1].reason is None]
            if running:
                engine.step(AT_ONCE)
            elif line is None:
                return
    finally:
        for _, request in running:
            request.cancel()


def _result(request: Request) -> dict[str, Any]:
    found = {"text": request.text, "reason": request.reason, "tokens": len(request.ids), "seed": request.params.seed}
    return found if request.error is None else found | {"error": str(request.error)}


def _encoded(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False).encode() + b"\n"


def _write(file: Any, line: bytes) -> None:
    """Nothing is held back: an interruption between lines finds them whole."""
    written = 0
    while written < len(line):
        written += file.write(line[written:])
