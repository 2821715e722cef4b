"""Reading a Hugging Face config: what is there is checked before it is believed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pyllm.nn.position import SCALINGS

_LARGEST = 2**31 - 1
_MOST_LABELS = 1 << 16


def whole(config: dict, name: str, default: int | None = None, *, optional: bool = False, least: int = 1) -> Any:
    """A whole number from 1, or another least one; None only where it is optional."""
    value = config.get(name)
    if value is None:
        value = default
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
        raise ValueError(f"config: {name} must be a whole number from {least} to {_LARGEST}, but got {value!r}")
    return value


def number(config: dict, name: str, default: float | None = None, *, optional: bool = False) -> Any:
    """A finite number above 0, as a float; None only where it is optional."""
    value = config.get(name)
    if value is None:
        value = default
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"config: {name} must be a number above 0, but got {value!r}")
    return float(value)


def fraction(config: dict, name: str, default: float) -> float:
    """A number from 0 to 1, as a float."""
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"config: {name} must be a number from 0 to 1, but got {value!r}")
    return float(value)


def token_id(config: dict, name: str, vocab_size: int, default: int | None = None) -> int | None:
    """The id of a token, if there is one."""
    value = config.get(name)
    if value is None:
        value = default
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size):
        raise ValueError(f"config: {name} must be the id of a token, from 0 to {vocab_size - 1}, but got {value!r}")
    return value


def token_ids(config: dict, name: str, vocab_size: int, default: int | None = None) -> list[int]:
    """The ids of one token or of several, which may be none."""
    value = config.get(name, default)
    if not isinstance(value, list):
        value = [value]
    found = [token_id({name: i}, name, vocab_size) for i in value]
    return [i for i in found if i is not None]


def answer_ids(config: dict, vocab_size: int) -> dict[str, Any]:
    """The ids that an encoder-decoder's sources are padded with, and that its answers begin and end with."""
    return {
        "pad_id": token_id(config, "pad_token_id", vocab_size),
        "start_id": token_id(config, "decoder_start_token_id", vocab_size),
        "eos_ids": token_ids(config, "eos_token_id", vocab_size),
        "forced_bos_id": token_id(config, "forced_bos_token_id", vocab_size),
        "forced_eos_id": token_id(config, "forced_eos_token_id", vocab_size),
    }


def to_answer_ids(config: dict) -> dict[str, Any]:
    """The reverse of `answer_ids`."""
    eos = config["eos_ids"]
    return {
        "pad_token_id": config["pad_id"],
        "decoder_start_token_id": config["start_id"],
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "forced_bos_token_id": config["forced_bos_id"],
        "forced_eos_token_id": config["forced_eos_id"],
    }


def flag(config: dict, name: str, default: bool) -> bool:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, bool):
        raise ValueError(f"config: {name} must be true or false, but got {value!r}")
    return value


def choice(config: dict, name: str, choices: dict[str, str], default: str) -> str:
    """What one of the names stands for."""
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"config: {name} must be one of {', '.join(choices)}, but got {value!r}")
    return choices[value]


def one_of(config: dict, name: str, choices: Sequence[str]) -> str | None:
    """One of the names, or None."""
    value = config.get(name)
    if value is not None and value not in choices:
        raise ValueError(f"config: {name} must be one of {', '.join(choices)}, but got {value!r}")
    return value


def label_names(config: dict) -> list[str]:
    """The names of the labels that a model scores: id2label's, or LABEL_0 and so on, two if nothing is said."""
    names = config.get("id2label")
    if names is None:
        count = whole(config, "num_labels", 2)
        if count > _MOST_LABELS:  # before their names take memory
            raise ValueError(f"config: num_labels must be up to {_MOST_LABELS}, but got {count}")
        return [f"LABEL_{i}" for i in range(count)]
    if not isinstance(names, dict) or not names or set(names) != {str(i) for i in range(len(names))}:
        raise ValueError(f"config: id2label must name the labels from 0 on, but got {names!r}")
    labels = [names[str(i)] for i in range(len(names))]
    if not all(isinstance(label, str) for label in labels):
        raise ValueError(f"config: id2label must have names that are strings, but got {names!r}")
    return labels


def to_labels(labels: Sequence[str]) -> dict[str, Any]:
    """The reverse of `label_names`."""
    return {"id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)}}  # fmt: skip


def fixed(config: dict, name: str, value: Any) -> None:
    """A setting that is known in one form only."""
    if config.get(name) not in (None, value):
        raise ValueError(f"config: {name} must be {value!r}: nothing else is known here, but got {config[name]!r}")


def rope(config: dict, theta: float = 10000.0) -> dict[str, Any]:
    """rope_theta and rope_scaling, from rope_parameters or, as older configs have it, from keys of their own.

    And, for longrope, a context_length: that of its short factors."""
    found = config.get("rope_parameters")
    if found is None:
        found = config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ValueError(f"config: rope_parameters must be a table, but got {found!r}")
    scaling = {k: v for k, v in found.items() if v is not None and k not in ("type", "partial_rotary_factor")}
    kind = scaling.pop("rope_type", found.get("type", "default"))
    if not isinstance(kind, str):
        raise ValueError(f"config: rope_type must be a name, but got {kind!r}")
    base = number(scaling, "rope_theta", number(config, "rope_theta", theta))
    scaling.pop("rope_theta", None)
    if kind == "default":
        return {"rope_theta": base, "rope_scaling": None}
    if kind not in SCALINGS:
        raise ValueError(f"config: rope_type must be one of default, {', '.join(SCALINGS)}, but got {kind!r}")
    if kind in ("llama3", "yarn", "longrope") and "original_max_position_embeddings" not in scaling:
        scaling["original_max_position_embeddings"] = config.get("original_max_position_embeddings") or whole(
            config, "max_position_embeddings"
        )
    made: dict[str, Any] = {"rope_theta": base, "rope_scaling": {"rope_type": kind} | scaling}
    if kind == "longrope":
        longest, original = whole(config, "max_position_embeddings"), whole(scaling, "original_max_position_embeddings")
        made["rope_scaling"].setdefault("factor", longest / original)
        made["context_length"] = min(longest, original)
    return made


def for_long_texts(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that `rope` gave, but with longrope's long factors, at any length, and the context that they are for."""
    scaling = settings.get("rope_scaling") or {}
    if scaling.get("rope_type") != "longrope":
        raise ValueError("long must be False: it is for longrope, which has factors for long texts, and this has "
                         f"{scaling.get('rope_type', 'no scaling')}")  # fmt: skip
    longest = round(scaling["original_max_position_embeddings"] * scaling["factor"])
    return settings | {"context_length": longest, "rope_scaling": scaling | {"long": True}}


def rotary_dim(config: dict, head_dim: int, default: float = 1.0) -> int | None:
    """How many elements of a head turn; None for all."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    part = number(found, "partial_rotary_factor", number(config, "partial_rotary_factor", default))
    if part > 1 or int(head_dim * part) < 2:
        raise ValueError(f"config: partial_rotary_factor must be up to 1 and turn 2 of {head_dim}, but got {part}")
    return None if part == 1 else int(head_dim * part)


def to_rope(config: dict) -> dict[str, Any]:
    """The reverse of `rope`."""
    if (config["rope_scaling"] or {}).get("long"):
        raise ValueError("no config says that longrope's long factors are for any length")
    return {"rope_type": "default", "rope_theta": config["rope_theta"]} | (config["rope_scaling"] or {})


def windowed_layers(config: dict, layers: int, default: list[int]) -> list[int]:
    """The layers that layer_types says have a sliding window."""
    kinds = config.get("layer_types")
    if kinds is None:
        return default
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or not all(k in known for k in kinds):
        raise ValueError(f"config: layer_types must be a list of {layers} of {', '.join(known)}, but got {kinds!r}")
    return [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]


def layer_types(config: dict) -> list[str]:
    """The reverse of `windowed_layers`."""
    windowed = config["window_layers"] if config["window_layers"] is not None else range(config["num_layers"])
    windowed = set(windowed) if config["window"] is not None else ()
    return ["sliding_attention" if i in windowed else "full_attention" for i in range(config["num_layers"])]


def generation_settings(config: dict) -> dict[str, Any]:
    """What a generation_config.json says of the ids that answers begin and end with; where there is such a file, an id
    that is forced is looked for in no other."""
    forced = {name: config.get(name) for name in ("forced_bos_token_id", "forced_eos_token_id")}
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "bad_words_ids")
    return forced | {name: config[name] for name in names if config.get(name) is not None}


# Settings for generating that change what is generated, that are not followed here, and the values that mean nothing.
_UNHEEDED: dict[str, tuple] = {
    "num_beams": (1,), "length_penalty": (1,), "early_stopping": (False,), "num_beam_groups": (1,),
    "num_return_sequences": (1,), "min_length": (0,),
    "min_new_tokens": (0,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "bad_words_ids": ([],), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "forced_decoder_ids": ([],), "force_words_ids": ([],), "constraints": ([],),
    "sequence_bias": ([], {}), "exponential_decay_length_penalty": (), "penalty_alpha": (0,), "guidance_scale": (1,),
    "dola_layers": (), "watermarking_config": (),
}  # fmt: skip


def unheeded_settings(config: dict, suppressed: Sequence[int] = ()) -> dict[str, Any]:
    """What a generation_config.json, or an older config.json, asks for that generating here does not do; ids that the
    model never generates anyway are `suppressed`."""
    found = {name: config[name] for name, idle in _UNHEEDED.items() if config.get(name) not in (None, *idle)}
    if found.get("bad_words_ids") == [[i] for i in suppressed]:
        del found["bad_words_ids"]
    if "num_beams" not in found:  # without beams these mean nothing
        for name in ("length_penalty", "early_stopping"):
            found.pop(name, None)
    return found
