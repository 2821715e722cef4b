"""Vocabularies of other programs, made into tokenizers of the `tokenizers` library."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from pyllm.text.charsmap import check as check_charsmap

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # as sentencepiece and GGUF number them
_SPACE = "\u2581"  # how sentencepiece spells a space
BYTE_BORDER = "<(?=0x[0-9A-F]{2}>)"
_LONGEST = 256  # of a piece, in characters: each of its places to cut is looked at

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN_2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
# How a text is split into words before byte-pair encoding, under GGUF's names ("tokenizer.ggml.pre").
SPLITS: dict[str, str | None] = {
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "roberta-bpe"), None),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN_2),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell"), r"\p{N}"),
}


def byte_level(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], control: Iterable[str],
               user_defined: Iterable[str] = (), split: str = "gpt-2") -> tokenizers.Tokenizer:  # fmt: skip
    """Byte-pair encoding on bytes, as GPT-2 has it; `split` names the way words are split (a key of SPLITS)."""
    if split not in SPLITS:
        raise ValueError(f"the way to split words {split!r} is not known; known are: {', '.join(sorted(SPLITS))}")
    pattern = SPLITS[split]
    model = models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=pattern == _LLAMA_3)
    backend = tokenizers.Tokenizer(model)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (None, r"\p{N}"))
    backend.pre_tokenizer = words
    if pattern is not None:
        splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([splitter, words])
    backend.decoder = decoders.ByteLevel()
    add_tokens(backend, control, user_defined)
    return backend


def word_piece(tokens: Sequence[str], *, lowercase: bool | None = None, strip_accents: bool | None = None,
               chinese: bool = True, unknown: str = "[UNK]",
               control: Iterable[str] = ()) -> tokenizers.Tokenizer:  # fmt: skip
    """WordPiece as BERT has it: tokens in order of their ids, those inside of a word marked by ##.

    Where `lowercase` is not given, the vocabulary says it: one without capital letters is for lower case.
    """
    vocabulary = unique(tokens)
    if unknown not in vocabulary:
        raise ValueError(f"a WordPiece vocabulary must have the token {unknown!r}")
    special = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", unknown, *control) if t in vocabulary]
    if lowercase is None:
        lowercase = not any(re.search("[A-Z]", t) for t in tokens if not (t.startswith(("[", "<"))))
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=chinese,
                                                    strip_accents=strip_accents, lowercase=lowercase)  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    if "[CLS]" in vocabulary and "[SEP]" in vocabulary:
        ends = ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
        backend.post_processor = processors.BertProcessing(*ends)
    add_tokens(backend, special)
    return backend


def sentence_piece(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], *, unigram: bool,
                   prefix: bool = True, squeeze: bool = False,
                   charsmap: bytes = b"") -> tokenizers.Tokenizer:  # fmt: skip
    """What sentencepiece makes of a text (Kudo and Richardson, 2018, https://arxiv.org/abs/1808.06226).

    Args:
        pieces, scores, types: of each id; a space is spelled U+2581.
        unigram: the likeliest pieces (Kudo, 2018, https://arxiv.org/abs/1804.10959); otherwise byte-pair encoding, in
            which the pair that makes the piece of the best score is merged first.
        prefix: whether a space is put before the text.
        squeeze: whether spaces at both ends are dropped and runs of them become one.
        charsmap: sentencepiece's compiled normalisation.
    """
    if not pieces or not len(pieces) == len(scores) == len(types):
        raise ValueError(f"got {len(pieces)} pieces, {len(scores)} scores and {len(types)} types")
    vocabulary = unique(pieces)
    if not all(0 <= t <= BYTE for t in types):
        raise ValueError(f"a piece must be of a type from 0 to {BYTE}, but one is of another")
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    bytes_ = all(t in vocabulary for t in byte_tokens)
    if types.count(UNKNOWN) != 1:
        raise ValueError(f"there must be a piece for what is unknown (type 2), but there are {types.count(UNKNOWN)}")
    unknown = types.index(UNKNOWN)
    if not all(map(math.isfinite, scores)):
        raise ValueError("a score is no finite number")
    if unigram:
        model: models.Model = models.Unigram(list(zip(pieces, map(float, scores), strict=True)), unknown, bytes_)
    else:
        merges = _merges(vocabulary, scores, types)
        model = models.BPE(vocab=vocabulary, merges=merges, unk_token=pieces[unknown], fuse_unk=True,
                           byte_fallback=bytes_)  # fmt: skip
    backend = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = []
    if charsmap:
        check_charsmap(charsmap)
        steps.append(normalizers.Precompiled(charsmap))
    if squeeze:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    if unigram and bytes_:
        part_bytes(backend)
    backend.decoder = _joined(prefix)
    control = [p for p, t in zip(pieces, types, strict=True) if t in (UNKNOWN, CONTROL)]
    add_tokens(backend, control, [p for p, t in zip(pieces, types, strict=True) if t == USER_DEFINED])
    return backend


def table(vocabulary: dict[str, int], unknown: str) -> tokenizers.Tokenizer:
    """Of pieces that sentencepiece cut: only their ids."""
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=unknown))
    backend.decoder = _joined(True)
    return backend


def _joined(prefix: bool) -> decoders.Decoder:
    """What makes a text of pieces, where a space may have been put before it."""
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)


def part_bytes(backend: tokenizers.Tokenizer) -> None:
    """Parts what spells a byte, such as <0x41>, which a unigram model would take for that byte."""
    split = pre_tokenizers.Split(Regex(BYTE_BORDER), "merged_with_previous")
    before = backend.pre_tokenizer
    backend.pre_tokenizer = split if before is None else pre_tokenizers.Sequence([before, split])


def unique(tokens: Sequence[str]) -> dict[str, int]:
    """The id of each token, which is its place."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocabulary[t] != i)
        raise ValueError(f"the token {twice!r} is there twice")
    return vocabulary


def add_tokens(backend: tokenizers.Tokenizer, control: Iterable[str], user_defined: Iterable[str] = ()) -> None:
    """Makes tokens of the vocabulary control tokens, or tokens that are found in a text before all others."""
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in dict.fromkeys(control) if t])
    user = [AddedToken(t, special=False, normalized=_SPACE in t) for t in dict.fromkeys(user_defined) if t]
    backend.add_tokens(user)


def begin_with(backend: tokenizers.Tokenizer, id: int) -> None:
    """Makes the library's own post-processing put the token `id` first, for other programs that read tokenizer.json."""
    token = backend.id_to_token(id)
    template = f"{token}:0 $A:0", f"{token}:0 $A:0 {token}:0 $B:0"
    if token is not None and not re.search(r"[\s:$]", token):
        backend.post_processor = processors.TemplateProcessing(*template, [(token, id)])


def _merges(vocabulary: dict[str, int], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The pairs whose join is a piece, those of the best score first."""
    usable = {piece for piece, i in vocabulary.items() if types[i] == NORMAL}
    found = []
    for piece in usable:
        if len(piece) > _LONGEST:
            raise ValueError(f"a piece may have {_LONGEST} characters, but one has {len(piece)}")
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                found.append((-scores[vocabulary[piece]], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
