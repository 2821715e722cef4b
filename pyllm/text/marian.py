from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from pyllm.text.tokenizer import Tokenizer, write_config, write_file

_CODE = re.compile(">>.*?<<", re.DOTALL)


class MarianTokenizer(Tokenizer):
    """The tokenizer of a folder with source.spm, target.spm and vocab.json, as `Tokenizer.load` gives it.

    A text is cut by the sentencepiece model of its side, and a piece has the id that vocab.json says, or is unknown.
    The code of a language that a text begins with, such as >>fra<<, is a piece: it chooses the language of the answer.
    It is saved as the files that it came from.

    Attributes:
        targets: the tokenizer of what answers are to be, for training; this one is for what is to be answered.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, cutters: Sequence[tokenizers.Tokenizer],
                 files: Mapping[str, bytes], **arguments: Any):  # fmt: skip
        """backend: of vocab.json; cutters: of the two models, or of one that serves targets; files: all by name."""
        super().__init__(backend, **arguments)
        self._files, self._cutters, self._ids = files, cutters, backend.get_vocab(with_added_tokens=True)
        self._unknown = self._ids[backend.model.unk_token]
        cutters[0].encode_special_tokens = True
        self._encoder = cutters[0]
        self.targets = MarianTokenizer(backend, cutters=cutters[1:], files=files, **arguments) if cutters[1:] else self

    def encode_framed(self, text: str, second: str | None = None) -> tuple[list[int], list[int]]:
        """The ids of a text, or of two in a row, and EOS; and 0 for each."""
        ids = self.encode(text) + ([] if second is None else self.encode(second)) + list(self.eos_ids[:1])
        return ids, [0] * len(ids)

    def to_json(self) -> str:
        raise ValueError("[tokenizer] no tokenizer.json says what one of Marian's does: save it into a folder")

    def save(self, path: str | os.PathLike) -> None:
        """Writes source.spm, target.spm, vocab.json and tokenizer_config.json into a folder."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"[tokenizer] one of Marian's is saved into a folder, but {path} is none")
        for name, contents in self._files.items():
            write_file(path / name, contents)
        write_config(path, self.config())

    def config(self) -> dict[str, Any]:
        return super().config() | {"tokenizer_class": "MarianTokenizer"}

    def __reduce__(self):
        cutters = [cutter.to_str() for cutter in self._cutters]
        return _restored, (self._backend.to_str(), cutters, self._files, self._arguments())

    def _encode(self, backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        codes = [found[0] if (found := _CODE.match(text)) else "" for text in texts]
        rests = [text[len(code) :] for text, code in zip(texts, codes, strict=True)]
        pieces = [encoding.tokens for encoding in backend.encode_batch(rests, add_special_tokens=False)]
        return [[self._ids.get(piece, self._unknown) for piece in ([code] if code else []) + cut]
                for code, cut in zip(codes, pieces, strict=True)]  # fmt: skip


def _restored(backend: str, cutters: list[str], files: Mapping[str, bytes], arguments: dict[str, Any]) -> Tokenizer:
    made = (tokenizers.Tokenizer.from_str(contents) for contents in (backend, *cutters))
    return MarianTokenizer(next(made), cutters=list(made), files=files, **arguments)
