"""Whether what was written is what was meant: read again, and compared with the model and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyllm.checkpoint.files import CheckpointError, short
from pyllm.checkpoint.loading import load
from pyllm.models import Model, Pair
from pyllm.nn.evaluating import evaluating
from pyllm.text import Tokenizer

_TEXTS = (
    "",
    f"{' ' * 5}a{' ' * 45}b{chr(10) * 7}",
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces,\ttabs\t\tand\r\nlines\n\n\nof 3.14159, 1234567 and 1e-5; it's we'll THEY'RE  ",
    "naïve cafés, cafe\u0301s; Сказка, παραμύθι",
    "模型です。 한국어 مرحبا שלום हिन्दी",
    "\U0001f469\u200d\U0001f680 \U0001f44d\U0001f3fd \u200b\u00a0\u3000 \ufb01 \u00bd \u2122 \x00\x7f",
    "def f(x):\n    return x['key'] != \"value\"  # <tag> [INST] {} \\n",
)
_CHATS = (
    [{"role": "user", "content": "Hello, 世界!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 1 + 1? "},
     {"role": "assistant", "content": "2"}, {"role": "user", "content": "And\nthen?"}],
)  # fmt: skip
_SPELLED = 64  # control tokens that are tried
# How far apart logits may be, as a part of their spread, where what was written is of another dtype.
_ALLOWED = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def check_same(model: Model, tokenizer: Tokenizer | None, path: Path,
               progress: Callable[[int, int], None] | None = None) -> None:  # fmt: skip
    """Loads a checkpoint and compares it: settings, weights (rounded to its dtype), logits; ids and text of a handful
    of texts and of control tokens, and conversations as the chat template writes them.

    Raises:
        CheckpointError: there is a difference; the error names the first.
    """
    again, its = load(path, progress=progress)
    if wrong := differences(model, again):
        raise _differs("the model", f"it has no {', '.join(wrong)}")
    _check_weights(model, again)
    _check_logits(model, again)
    if (tokenizer is None) != (its is None):
        raise _differs("the tokenizer", "there is one" if tokenizer is None else "there is none")
    if tokenizer is not None and its is not None:
        for (what, expected), (_, found) in zip(_facts(tokenizer, tokenizer), _facts(its, tokenizer), strict=True):
            if expected != found:
                raise _differs(what, f"{short(expected)} became {short(found)}")


def differences(model: Model, other: Model) -> list[str]:
    """The settings of a model, but those that only training needs, that another has not."""
    ours, theirs = _settings(model), _settings(other)
    return [f"{key} {short(ours[key])}" for key in ours if ours[key] != theirs.get(key)]


def _settings(model: Model) -> dict[str, Any]:
    """A model's config, with defaults that follow from other settings filled in, but for what only training needs and
    for the ends of texts, to which the tokenizer's are added."""
    settings = {key: value for key, value in model.config.items() if not key.endswith("dropout") and key != "eos_ids"}
    if settings.get("num_heads"):
        settings["num_kv_heads"] = settings.get("num_kv_heads") or settings["num_heads"]
        settings["head_dim"] = settings.get("head_dim") or settings["hidden_size"] // settings["num_heads"]
    return settings


def _differs(what: str, how: str) -> CheckpointError:
    return CheckpointError(f"[export] what was written must come back the same, but {what} does not: {how}")


def _check_weights(model: Model, again: Model) -> None:
    found = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in found or found[name].shape != parameter.shape:
            raise _differs("the weights", f"{name} is missing or of another shape")
        expected = parameter.detach().to("cpu", found[name].dtype)
        # GGUF keeps 1 + weight of some norms.
        slack = 2**-22 if parameter.dim() == 1 else 0.0
        if not torch.allclose(found[name].detach(), expected, rtol=0, atol=slack, equal_nan=True):
            raise _differs("the weights", f"{name} has other values")


@torch.no_grad()
def _check_logits(model: Model, again: Model) -> None:
    width = min(32, model.context_length or 32)
    ids = (torch.arange(2 * width) * 7919 % model.vocab_size).view(2, width)
    with evaluating(model):
        expected = _outputs(model, ids.to(next(model.parameters()).device)).double().cpu()
    found = _outputs(again, ids).double()
    spread = (expected - expected.mean()).square().mean().sqrt().item()
    error = (found - expected).square().mean().sqrt().item()
    allowed = max(_ALLOWED.get(p.dtype, 0.0) for m in (model, again) for p in m.parameters())
    if not error <= allowed * spread:
        raise _differs("the logits", f"they are {error:.2g} apart, of {spread:.2g} at most {allowed * spread:.2g}")


def _outputs(model: Model, ids: Tensor) -> Tensor:
    """All that a model makes of ids, as one row; one that answers makes it of the ids as source and as target."""
    return torch.cat([tensor.flatten() for tensor in _tensors(model(Pair(ids, ids) if model.answers else ids))])


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(branch)


def _facts(tokenizer: Tokenizer, original: Tokenizer) -> Iterator[tuple[str, Any]]:
    """What a tokenizer says, and makes of texts; further ids than the original's, which no text becomes, are none."""
    yield "the tokenizer's BOS", (tokenizer.bos_id, tokenizer.add_bos)
    yield "the tokenizer's EOS", tokenizer.eos_ids
    size = len(original)
    yield "the vocabulary", [tokenizer.token(i) for i in range(size) if original.token(i) is not None]
    control = [i for i in range(size) if original.is_control(i)]
    yield "the control tokens", [i for i in range(size) if tokenizer.is_control(i)]
    spelled = [f"a{original.token(i)} b{original.token(i)}\n" for i in control[:_SPELLED]]
    for text in (*_TEXTS, *spelled):
        for special in (False, True):
            ids = tokenizer.encode(text, allow_special=special)
            yield f"the ids of {short(text)}", ids
            yield f"the text of the ids of {short(text)}", tokenizer.decode(ids)
    yield "the chat template", tokenizer.chat_template
    for chat in _CHATS if tokenizer.chat_template is not None else ():
        for prompt in (False, True):
            yield "what the chat template writes", _written(tokenizer, chat, prompt)


def _written(tokenizer: Tokenizer, chat: list, prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(chat, add_generation_prompt=prompt)
    except (ImportError, ValueError) as e:  # a template may refuse a conversation, and then does so again
        return f"{type(e).__name__}: {e}"
