"""What programs for some kinds of checkpoints add to a tokenizer whose files do not say it: where sentencepiece's
pieces go, and the frame of texts. A tokenizer.json says all of it itself."""

from __future__ import annotations

import re
from typing import Any

import tokenizers
from tokenizers import processors

from pyllm.text.vocabulary import CONTROL, UNKNOWN

Piece = tuple[str, float, int]  # its text, its score and its type
_SENTENCE = ("<s> $A </s>", "<s> $A </s> </s> $B </s>")
_FRAMES = {"t5": ("$A </s>", "$A </s> $B </s>")} | dict.fromkeys(
    ("bart", "roberta", "xlmroberta", "camembert"), _SENTENCE
)
_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>",
          "sep_token": "</s>", "mask_token": "<mask>"}  # fmt: skip
_FIRST = ["<unk>", "<s>", "</s>"]
_INSTEAD = {"xlmroberta": (3, ("<s>", "<pad>", "</s>", "<unk>")),
            "camembert": (1, ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"))}  # fmt: skip


def kind_of(tokenizer: dict[str, Any], model: dict[str, Any]) -> str:
    """The kind that a tokenizer_config.json names, or a config.json: "t5", "xlmroberta", ..."""
    named = tokenizer.get("tokenizer_class") or model.get("model_type") or ""
    return re.sub("tokenizer(fast)?$|[^a-z0-9]", "", named.lower()) if isinstance(named, str) else ""


def arranged(kind: str, pieces: list[Piece], further: Any = 100) -> list[Piece]:
    """The pieces in order of their ids; T5 has `further` ones, that stand for parts of a text that are left out.

    Raises:
        ValueError: the pieces are not those of this kind.
    """
    if kind == "t5":
        if not isinstance(further, int) or not 0 <= further <= 10000:
            raise ValueError(f"extra_ids must be from 0 to 10000, but got {further!r}")
        return pieces + [(f"<extra_id_{i}>", 0.0, CONTROL) for i in reversed(range(further))]
    if kind not in _INSTEAD:
        return pieces
    if [piece for piece, *_ in pieces[:3]] != _FIRST:
        raise ValueError(f"the first pieces for {kind} must be {', '.join(_FIRST)}")
    count, instead = _INSTEAD[kind]
    first = [(piece, 0.0, UNKNOWN if piece == "<unk>" else CONTROL) for piece in instead]
    return [*first, *pieces[count:], ("<mask>", 0.0, CONTROL)]


def frame(backend: tokenizers.Tokenizer, kind: str) -> dict[str, str]:
    """Gives a tokenizer the frame of its kind, if there is one; returns what roles its tokens have then."""
    if kind not in _FRAMES:
        return {}
    ids = {token: backend.token_to_id(token) for token in ("<s>", "</s>")}
    single, pair = _FRAMES[kind]
    named = [(token, id) for token, id in ids.items() if token in single.split()]
    if any(id is None for _, id in named):
        raise ValueError(f"the vocabulary of {kind} must have {' and '.join(token for token, _ in named)}")
    backend.post_processor = processors.TemplateProcessing(single, pair.replace("$B", "$B:0"), named)
    wanted = ("eos_token", "unk_token", "pad_token") if kind == "t5" else _ROLES
    return {role: _ROLES[role] for role in wanted if backend.token_to_id(_ROLES[role]) is not None}
