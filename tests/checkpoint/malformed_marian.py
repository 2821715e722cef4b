"""Wrong folders of Marian's tokenizers: two sentencepiece models and a table."""

from collections.abc import Iterator

from checkpoint.malformed_text import CHARSMAP, SPACE, field, model, text


def folder(**changed: bytes | None) -> dict[str, bytes]:
    """A folder of Marian's, but for some files, by name without ending; None for one that is missing."""
    table = {"</s>": 0, "<unk>": 1, SPACE: 2, "a": 3, "b": 4, "<pad>": 5}
    files = {"source": model(kind=1), "target": model(kind=1), "vocab": text(table)} | changed
    ends = {"vocab": "json", "tokenizer_config": "json"}
    return {f"{name}.{ends.get(name, 'spm')}": data for name, data in files.items() if data is not None}


def cases() -> Iterator[tuple[str, dict[str, bytes]]]:
    for side in ("source", "target"):
        yield f"{side} cut", folder(**{side: model(kind=1)[:-3]})
        yield f"{side} of merges", folder(**{side: model(kind=2)})
        yield f"{side} empty", folder(**{side: b""})
        yield f"{side} a normalisation that points outside", folder(**{side: model(kind=1, form=field(2, CHARSMAP))})
    for name in ("target", "vocab"):
        yield f"no {name}", folder(**{name: None})
    for what, vocab in {
        "cut": text({"</s>": 0, "<unk>": 1})[:-2], "a list": text(["</s>", "<unk>", "<pad>"]), "empty": text({}),
        "an id twice": text({"</s>": 0, "<unk>": 1, "<pad>": 1}), "no padding": text({"</s>": 0, "<unk>": 1}),
        "an id of 2^40": text({"</s>": 0, "<unk>": 1, "<pad>": 1 << 40}), "a token twice": b'{"</s>": 0, "</s>": 1}',
        "an id that is a text": text({"</s>": 0, "<unk>": 1, "<pad>": "2"}),
    }.items():  # fmt: skip
        yield f"vocab {what}", folder(vocab=vocab)
    for what, config in {"separate": {"separate_vocabs": True}, "unknown": {"unk_token": "x"},
                         "number": {"eos_token": 3}}.items():  # fmt: skip
        yield f"config {what}", folder(tokenizer_config=text(config))
