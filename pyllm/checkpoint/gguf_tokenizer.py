"""A tokenizer as the metadata of a GGUF file: the reverse of `Tokenizer.from_gguf_metadata`."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from pyllm.text import Tokenizer
from pyllm.text.vocabulary import BYTE, CONTROL, NORMAL, SPLITS, UNKNOWN, UNUSED, USER_DEFINED

_SPACE = "\u2581"  # how sentencepiece spells a space
_ENDS = ("eos", "eot", "eom")
_NEVER = -10000.0  # the score of what no text becomes


def tokenizer_metadata(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """The metadata of a tokenizer for a model of `size` ids; those that it does not have become unused ones.

    Raises:
        ValueError: GGUF has no place for what the tokenizer does, or the model none for all its ids.
    """
    if len(tokenizer) > size:
        raise _none(f"it has {len(tokenizer)} ids, but the model {size}")
    contents = json.loads(tokenizer.to_json())
    model = contents["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise _none(f"it is of the kind {model['type']}")
    if len(tokenizer.eos_ids) > len(_ENDS):
        raise _none(f"{len(tokenizer.eos_ids)} tokens end a text")
    added = {token["id"]: token for token in contents["added_tokens"]}
    for token in added.values():
        for flag in ("single_word", "lstrip", "rstrip"):
            if token[flag]:
                raise _none(f"its token {token['content']!r} has {flag}")
    known = [tokenizer.token(i) for i in range(size)]
    tokens = [f"[PAD{i}]" if token is None else token for i, token in enumerate(known)]
    types = [UNUSED if token is None else NORMAL for token in known]
    for id, token in added.items():
        types[id] = CONTROL if token["special"] else USER_DEFINED
    if model["type"] == "BPE" and _is_byte_level(contents["pre_tokenizer"]):
        found = _byte_level(contents)
    else:
        found = _sentence_piece(contents, tokens, types)
    roles = {"bos": tokenizer.bos_id, **dict(zip(_ENDS, tokenizer.eos_ids, strict=False)),
             "unknown": tokenizer.unknown_id}  # fmt: skip
    found |= {"tokens": tokens, "token_type": types, "add_bos_token": tokenizer.add_bos, "add_eos_token": False}
    found |= {f"{role}_token_id": id for role, id in roles.items() if id is not None}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    if found["model"] == "llama":
        _check_merges(metadata, _pairs(model["merges"]))
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _none(why: str) -> ValueError:
    return ValueError(f"[export] the tokenizer must be one that GGUF has a place for, but {why}")


def _steps(part: dict | None, name: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    return [s for p in part[name] for s in _steps(p, name)] if part["type"] == "Sequence" else [part]


def _is_byte_level(pre_tokenizer: dict | None) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(pre_tokenizer, "pretokenizers"))


def _byte_level(contents: dict) -> dict[str, Any]:
    model, steps = contents["model"], _steps(contents["pre_tokenizer"], "pretokenizers")
    split: str | None = ""
    if len(steps) == 1:
        split = None
    elif steps[0]["type"] == "Split" and not steps[0]["invert"]:
        split = steps[0]["pattern"].get("Regex", "")
    elif steps[0]["type"] == "Digits" and steps[0]["individual_digits"]:
        split = r"\p{N}"
    names = [name for name, pattern in SPLITS.items() if pattern == split]
    if len(steps) > 2 or not names:
        raise _none("the way that it splits words is not among those that GGUF files name")
    if steps[-1]["add_prefix_space"]:
        raise _none("it puts a space before a text")
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise _none("it marks the ends of words")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": names[0], "merges": merges}


def _sentence_piece(contents: dict, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Also sets the types of unknown and byte tokens."""
    model, unigram = contents["model"], contents["model"]["type"] == "Unigram"
    found: dict[str, Any] = {"model": "t5" if unigram else "llama", "pre": "default", "add_space_prefix": False,
                             "remove_extra_whitespaces": False}  # fmt: skip
    spaces = False
    for step in _steps(contents["normalizer"], "normalizers"):
        if step == {"type": "Prepend", "prepend": _SPACE}:
            found["add_space_prefix"] = True
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
            spaces = True
        elif step["type"] == "Precompiled":
            found["precompiled_charsmap"] = base64.b64decode(step["precompiled_charsmap"] or "")
        elif step["type"] == "Replace" and step["pattern"].get("Regex") in ("^ +| +$", " {2,}"):
            found["remove_extra_whitespaces"] = True
        else:
            raise _none(f"its normaliser has a step {step['type']}")
    for step in _steps(contents["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and not (step.get("split") and not unigram):
            found["add_space_prefix"] |= step["prepend_scheme"] != "never"
            spaces = True
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and spaces):
            raise _none(f"it splits words by {step['type']}")
    if not spaces:
        raise _none(f"it does not spell spaces {_SPACE}")
    if unigram:
        if model["unk_id"] is None:
            raise _none("it has no token for what is unknown")
        types[model["unk_id"]] = UNKNOWN
        scores = dict(model["vocab"])
    else:
        if model["unk_token"] is None or not model["fuse_unk"]:
            raise _none("it has no token for a run of unknown characters")
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
        scores = _scores(_pairs(model["merges"]))
    if model["byte_fallback"]:
        for i, token in enumerate(tokens):
            if types[i] == NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token):
                types[i] = BYTE
    found["scores"] = [_NEVER if types[i] == UNUSED else float(scores.get(t, 0.0)) for i, t in enumerate(tokens)]
    return found


def _pairs(merges: list) -> list[tuple[str, ...]]:
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _scores(pairs: list[tuple[str, ...]]) -> dict[str, float]:
    """Scores that put the pieces in the order in which they are merged first; where they are merged in turns, they
    have the same."""
    last = {left + right: i for i, (left, right) in enumerate(pairs)}
    scores: dict[str, float] = {}
    score, end = 0, -1
    for i, (left, right) in enumerate(pairs):
        score -= i > end
        scores.setdefault(left + right, float(score))
        end = max(end, last[left + right])
    return scores


def _check_merges(metadata: dict[str, Any], pairs: list[tuple[str, ...]]) -> None:
    """Raises unless the scores give the merges that they were made of. The order of those that make runs of one
    character, such as of spaces, cannot be told apart by scores: it does not count."""
    again = _pairs(json.loads(Tokenizer.from_gguf_metadata(metadata).to_json())["model"]["merges"])

    def pieces(pairs: list[tuple[str, ...]]) -> list[str]:
        made = [left + right for left, right in pairs]
        return [piece for piece in made if len(set(piece)) > 1]

    if set(again) != set(pairs) or pieces(again) != pieces(pairs):
        raise _none("its merges are not those of scored pieces")
