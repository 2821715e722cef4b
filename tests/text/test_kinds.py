"""What holds for every kind of tokenizer: a text begins once, what it spells is text, streams split no character."""

import json
import tempfile
from pathlib import Path

import pytest
import tokenizers
from checkpoint import malformed_text
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.data import embedded_corpus
from pyllm.text import Tokenizer, vocabulary
from pyllm.text.formats import from_gguf

SPACE, CONTROL = "\u2581", ["<s>", "</s>", "<|endoftext|>", "<unk>", "[CLS]", "[SEP]", "[UNK]", "<0x41>", "<0xE2>"]
WORDS = ["the", "fox", " foxes", "é", "国", "\U0001f469", "\u200d", "\n", "  ", "\t", "0x41>", "<", "\u0301", "\x00"]
LETTERS = sorted(set("the fox lives by sea é国.<>[]|/0123456789ABCDEFxUNKCLSEPunkdoftx") - {" "})
PROSE = embedded_corpus()[:3000]


def pieces(unigram: bool, bytes_: bool = True, **options) -> Tokenizer:
    """As sentencepiece makes them; control tokens are likely, so that a careless way would find them."""
    entries = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    entries += [(f"<0x{b:02X}>", 0.0, 6) for b in range(256)] if bytes_ else []
    words = [
        SPACE,
        *LETTERS,
        "th",
        "fo",
        "fox",
        "ox",
        SPACE + "th",
        SPACE + "the",
        SPACE + "fox",
        "es",
        "<0",
        SPACE + "<",
    ]
    entries += [(w, -1.0 - i / 8, 1) for i, w in enumerate(words)]
    backend = vocabulary.sentence_piece(*zip(*entries, strict=True), unigram=unigram, **options)
    return Tokenizer(backend, bos_id=1, eos_ids=[2], add_bos=True)


def of_json(tree: dict) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(tree)), bos_id=1)


def metaspace() -> Tokenizer:
    """A unigram model's tokenizer.json as Hugging Face makes it, saved and loaded."""
    tree = json.loads(pieces(True).to_json())
    space = {"replacement": SPACE, "prepend_scheme": "always", "split": True}
    tree |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", **space}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(tree), "utf-8")
        for _ in range(2):
            tokenizer = Tokenizer.load(path)
            tokenizer.save(path)
    return tokenizer


def gguf(tree: dict) -> Tokenizer:
    backend, arguments = from_gguf({f"tokenizer.{k}": v for k, v in tree.items()})
    return Tokenizer(backend, **arguments)


def with_bos(kind: str) -> Tokenizer:
    tokenizer = Tokenizer.train(kind, [PROSE, "".join(CONTROL + WORDS)])
    tokenizer.bos_id = tokenizer.eos_id
    return tokenizer


LOSSLESS = {
    "bpe": with_bos("bpe:300"),
    "unigram": with_bos("unigram:270"),
    "sentencepiece bpe": pieces(False, prefix=False),
    "sentencepiece bpe, prefix": pieces(False),
    "sentencepiece unigram": pieces(True, prefix=False),
    "sentencepiece unigram, prefix": pieces(True),
}
KINDS = LOSSLESS | {
    "char": with_bos("char"),
    "sentencepiece unigram, no bytes": pieces(True, False),
    "sentencepiece bpe, no bytes": pieces(False, False),
    "sentencepiece unigram, squeezed": pieces(True, squeeze=True),
    "tokenizer.json, bpe": of_json(malformed_text.BPE),
    "tokenizer.json, unigram": of_json(malformed_text.UNIGRAM),
    "tokenizer.json, word piece": of_json(malformed_text.WORD_PIECE),
    "word piece": Tokenizer(vocabulary.word_piece([*malformed_text.BERT, *LETTERS, *(f"##{c}" for c in LETTERS)]),
                            bos_id=2),
    "tokenizer.json, sentencepiece unigram": metaspace(),
    "gguf, gpt2": gguf(malformed_text.GPT2),
    "gguf, llama": gguf(malformed_text.LLAMA),
    "gguf, t5": gguf(malformed_text.LLAMA | {"ggml.model": "t5"}),
}  # fmt: skip
any_text = st.lists(st.sampled_from(CONTROL + WORDS) | st.text(st.characters(exclude_categories=["Cs"]))).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(text=any_text)
def test_what_a_text_spells_is_text(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text, bos=False)
    assert not any(tokenizer.is_control(i) and i != tokenizer.unknown_id for i in ids)
    assert tokenizer.encode_batch([text], bos=False) == [ids]
    if kind in LOSSLESS and SPACE not in text:
        assert tokenizer.decode(ids) == text
    if "sentencepiece" in kind and "no bytes" not in kind:
        assert tokenizer.decode(tokenizer.encode("<0x41>", bos=False)) == "<0x41>"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(text=any_text)
def test_a_text_begins_once(kind, text):
    tokenizer = KINDS[kind]
    if tokenizer.bos_id is None:
        with pytest.raises(ValueError, match="this tokenizer has none"):
            tokenizer.encode(text, bos=True)
        return
    ids = tokenizer.encode(text, bos=False)
    assert tokenizer.encode(text, bos=True) == [tokenizer.bos_id, *ids]
    assert tokenizer.encode(text) == ([tokenizer.bos_id] if tokenizer.add_bos else []) + ids
    spelled = tokenizer.encode(tokenizer.token(tokenizer.bos_id) + text, allow_special=True, bos=True)
    assert spelled == tokenizer.encode(tokenizer.token(tokenizer.bos_id) + text, allow_special=True, bos=False)
    assert spelled[0] == tokenizer.bos_id


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(text=any_text, data=st.data())
def test_a_stream_never_splits_a_character(kind, text, data):
    tokenizer = KINDS[kind]
    wild = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    wild = [i for i in wild if tokenizer.token(i) is not None]
    for ids in (tokenizer.encode(text, bos=False), wild):
        stream, said = tokenizer.stream(), ""
        for i in ids:
            new = stream.push(i)
            assert not new.endswith("\ufffd") or "\ufffd" in (tokenizer.token(i) or "")
            said += new
        assert said + stream.flush() == tokenizer.decode(ids)
