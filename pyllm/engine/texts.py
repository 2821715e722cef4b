"""Texts from texts: `pyllm.generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pyllm.engine.engine import Engine
from pyllm.engine.generation import TextStream, generate_ids, most_tokens, prompt_ids, stop_texts
from pyllm.engine.sampling import SamplingParams
from pyllm.models import Model
from pyllm.text import Tokenizer


def generate(model: Model, tokenizer: Tokenizer, prompt: str | Sequence[str], *, max_tokens: int | None = None,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, typical_p: float = 1.0,
             repetition_penalty: float = 1.0, frequency_penalty: float = 0.0, presence_penalty: float = 0.0,
             seed: int | None = None, stop: str | Sequence[str] = (), stream: bool = False, num_beams: int = 1,
             length_penalty: float | None = None,
             early_stopping: bool | str | None = None) -> str | list[str] | Iterator[str]:  # fmt: skip
    """Continues a text, or each of several, or answers it with an encoder-decoder; what is new alone is returned.

    Several are one batch, as in `generate_ids`; `Engine` is for more of them than fit one, or that come one by one.
    Warns where the model's checkpoint asks for another way of generating, such as beams.

    Args:
        max_tokens: how many at most; by default 256, or what fits the model's context.
        temperature, ..., seed: see `SamplingParams`; they are as given here, whatever the model's checkpoint says.
        stop: texts that end it, and that are not part of it. The tokenizer's end-of-text tokens always end it.
        stream: for one prompt, gives an iterator over pieces of the text as they become final.
        num_beams: from 2 on, nothing is drawn: the best text is returned that a search with so many beams finds, as in
            `Engine.beam_search`, whose are `length_penalty` and `early_stopping` too.

    Raises:
        ValueError: a setting out of its bounds, or a prompt that does not fit the model's context.
    """
    stops = stop_texts(stop)
    params = SamplingParams(temperature, top_k, top_p, min_p, typical_p, repetition_penalty, frequency_penalty,
                            presence_penalty, seed=seed)  # fmt: skip
    if num_beams != 1:
        texts = best_texts(model, tokenizer, [prompt] if isinstance(prompt, str) else prompt, params, num_beams,
                           max_tokens=max_tokens, stop=stops, stream=stream, length_penalty=length_penalty,
                           early_stopping=early_stopping)  # fmt: skip
        return texts[0] if isinstance(prompt, str) else texts
    if length_penalty is not None or early_stopping is not None:
        raise ValueError("length_penalty and early_stopping must be with num_beams of 2 or more")
    one = isinstance(prompt, str)
    if stream and not one:
        raise ValueError("stream=True takes one prompt")
    end = list(tokenizer.eos_ids)
    prompts = [prompt_ids(model, tokenizer, p) for p in ([prompt] if isinstance(prompt, str) else prompt)]
    streams = [TextStream(tokenizer, stops, () if model.answers else p, model.silent_ids) for p in prompts]
    steps = generate_ids(model, prompts, params, max_tokens=max_tokens, stop_ids=end)
    if stream:
        return _stream(steps, streams[0])
    texts = [""] * len(prompts)
    for ids in steps:
        for n, i in enumerate(ids):
            if i is not None and not streams[n].ended:
                texts[n] += streams[n].push(i)
        if all(s.ended for s in streams):
            break
    texts = [t + s.finish() for t, s in zip(texts, streams, strict=True)]
    return texts[0] if one else texts


def _stream(steps: Iterator[list[int | None]], text: TextStream) -> Iterator[str]:
    for (i,) in steps:
        if i is not None and (piece := text.push(i)):
            yield piece
        if text.ended:
            break
    if piece := text.finish():
        yield piece


def best_texts(model: Model, tokenizer: Tokenizer, prompts: Sequence[str], params: SamplingParams, num_beams: int, *,
               max_tokens: int | None = None, stop: Sequence[str] = (), stream: bool = False,
               length_penalty: float | None = None,
               early_stopping: bool | str | None = None) -> list[str]:  # fmt: skip
    """The best text for each prompt that a beam search finds.

    Raises:
        ValueError: settings for drawing, stop texts or streaming, which a search has no use for.
    """
    if params != SamplingParams() or stop or stream:
        raise ValueError("beams must be without settings for drawing, stop texts and streaming")
    ids = [prompt_ids(model, tokenizer, prompt) for prompt in prompts]
    room = max((len(i) + most_tokens(model, len(i), max_tokens) for i in ids), default=1)
    engine = Engine(model, tokenizer, max_sequences=max(num_beams, 1), max_length=room)
    return [engine.beam_search(i, num_beams, max_tokens=max_tokens, length_penalty=length_penalty,
                               early_stopping=early_stopping)[0].text for i in ids]  # fmt: skip
