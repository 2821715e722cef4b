import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyllm.data import embedded_corpus
from pyllm.text import Tokenizer

ENGLISH = "The quick brown fox jumps over the lazy dog.\n\n  It's 1,024 o'clock;\tthe end  \n" * 20
AWKWARD = (
    "國破山河在，城春草木深。 e\u0301 \u00e9 \U0001f469\u200d\U0001f467 \u200f\u0627\u0644\u0639\r\n\x00\t\ufeff\ufffd"
)
BPE = Tokenizer.train("bpe:350", [ENGLISH, AWKWARD])
PROSE = embedded_corpus()[:20000]
UNIGRAM = Tokenizer.train("unigram:350", [PROSE, AWKWARD])
CHAR = Tokenizer.train("char", [ENGLISH, AWKWARD])
unicode = st.text(st.characters(exclude_categories=["Cs"]))
known = st.text(st.sampled_from(sorted(set(ENGLISH + AWKWARD))))


@pytest.fixture(scope="module")
def poems(shared_data):
    poems = json.loads((shared_data / "tang300" / "tangshi300.json").read_text("utf-8"))
    return ["\n".join(poem["paragraphs"]) for poem in poems]


def check_stream(tokenizer, ids):
    stream, said = tokenizer.stream(), []
    for i in ids:
        new = stream.push(i)
        assert not new.endswith("\ufffd")
        said.append(new)
    assert "".join(said) + stream.flush() == tokenizer.decode(ids)
    assert stream.flush() == ""


@given(unicode | known)
def test_pieces_are_lossless_on_any_text(text):
    for tokenizer in (BPE, UNIGRAM):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids
        check_stream(tokenizer, ids)


@given(known)
def test_char_gives_each_known_character_an_id(text):
    ids = CHAR.encode(text)
    assert len(ids) == len(text) and CHAR.decode(ids) == text
    check_stream(CHAR, ids)


@given(unicode)
def test_char_gives_each_unknown_character_the_unknown_token(text):
    ids = CHAR.encode(text)
    assert [c in ENGLISH + AWKWARD for c in text] == [i != 0 for i in ids]
    assert CHAR.decode(ids) == "".join(c if c in ENGLISH + AWKWARD else "<unk>" for c in text)


@given(st.lists(st.integers(0, 349)))
def test_a_stream_of_any_ids_says_what_decoding_all_says(ids):
    check_stream(BPE, ids)


@given(st.lists(st.integers(1, 256)))
def test_a_stream_of_any_bytes_says_what_decoding_all_says(ids):
    check_stream(BPE, ids)


def test_a_stream_waits_for_the_whole_character():
    stream = BPE.stream()
    data = "a\U0001f469b".encode()
    one_byte = {BPE.decode([i]): i for i in range(1, 257)}
    printable = {b: i for b, i in zip(sorted(range(256), key=_stand_in), range(1, 257), strict=True)}
    assert one_byte["a"] == printable[ord("a")]
    assert [stream.push(printable[b]) for b in data] == ["a", "", "", "", "\U0001f469", "b"]
    assert stream.push(printable[0xF0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(printable[ord("c")]) == "c"


def _stand_in(byte: int) -> int:
    """The code point that stands for a byte in a byte-level vocabulary, whose ids are in this order."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    return byte if byte in shown else 256 + [b for b in range(256) if b not in shown].index(byte)


def test_a_stream_survives_a_bad_id():
    stream = CHAR.stream()
    ids = CHAR.encode("the fox")
    said = stream.push(ids[0])
    with pytest.raises(IndexError, match=r"\[decode\] ids must be in \[0, \d+\), but got -1"):
        stream.push(-1)
    assert said + "".join(map(stream.push, ids[1:])) + stream.flush() == "the fox"


@pytest.mark.parametrize("tokenizer", [CHAR, BPE, UNIGRAM], ids=["char", "bpe", "unigram"])
def test_control_tokens_in_text_are_text(tokenizer):
    text = "the <|endoftext|> dog"
    alphabet = Tokenizer.train("char", [ENGLISH, "<|>"]) if tokenizer is CHAR else tokenizer
    ids = alphabet.encode(text)
    assert alphabet.eos_id not in ids and alphabet.decode(ids) == text
    ids = alphabet.encode(text, allow_special=True)
    assert ids.count(alphabet.eos_id) == 1 and alphabet.decode(ids) == text
    assert alphabet.encode_batch([text], allow_special=True) == [ids]
    assert alphabet.eos_id not in alphabet.encode(text)
    assert "<|endoftext|>" in alphabet.decode([alphabet.eos_id])


def test_the_unknown_token_in_text_is_text():
    alphabet = Tokenizer.train("char", "<unk>")
    assert alphabet.decode(alphabet.encode("<unk>")) == "<unk>" and 0 not in alphabet.encode("<unk>")


def test_sizes():
    assert CHAR.vocab_size == len(CHAR) == len(set(ENGLISH + AWKWARD)) + 2
    assert BPE.vocab_size == 350
    assert Tokenizer.train("bpe:257", "a").vocab_size == 257
    with pytest.raises(
        ValueError, match=r"bpe:SIZE must be at least 257 \(256 bytes and <\|endoftext\|>\), but got 256"
    ):
        Tokenizer.train("bpe:256", ENGLISH)
    assert UNIGRAM.vocab_size == 350 and len(UNIGRAM.encode(PROSE)) < len(PROSE) / 1.4
    for kind in ("bpe:8000", f"bpe:{10**17}", "unigram:8000", f"unigram:{10**17}"):
        with pytest.raises(ValueError, match=rf"{kind} needs more text: these texts give at most \d+ tokens"):
            Tokenizer.train(kind, ENGLISH)


@pytest.mark.parametrize(
    "kind", ["", "bpe", "unigram", "wordpiece:300", "bpe:", "bpe:8k", "bpe:-1", "bpe:1e3", "Char", "char:5", "bpe:٣٠٠"]
)
def test_an_unknown_kind_is_an_error(kind):
    with pytest.raises(ValueError, match="the kinds are: char, bpe:SIZE, unigram:SIZE"):
        Tokenizer.train(kind, ENGLISH)


@pytest.mark.parametrize("texts", ["", [], ["", ""]])
def test_no_text_is_an_error(texts):
    for kind in ("char", "bpe:300"):
        with pytest.raises(ValueError, match="training needs text"):
            Tokenizer.train(kind, texts)


def test_text_that_is_no_text():
    for f in (CHAR.encode, lambda t: BPE.encode_batch([t]), lambda t: Tokenizer.train("char", [t])):
        with pytest.raises(ValueError, match=r"must be valid Unicode, but got '\\ud800' at character 2"):
            f("ab\ud800")
        with pytest.raises(TypeError, match="must be a str, but got bytes"):
            f(b"ab")


@pytest.mark.parametrize("ids", [[350], [0, -1], [0, 2**40], torch.tensor([3, 350])], ids=str)
def test_an_id_outside_the_vocabulary_is_an_error(ids):
    with pytest.raises(IndexError, match=rf"ids must be in \[0, 350\), but got {int(ids[-1])}"):
        BPE.decode(ids)


def test_decoding_tensors():
    ids = BPE.encode("the end")
    assert BPE.decode(torch.tensor(ids)) == BPE.decode(tuple(ids)) == "the end"
    assert BPE.decode([]) == BPE.decode(torch.tensor([], dtype=torch.int64)) == ""


def test_batches():
    texts = ["", "the fox", AWKWARD]
    for tokenizer in (CHAR, BPE, UNIGRAM):
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


@given(
    st.lists(
        st.sampled_from(["\n", " ", "\t", "\r", "\x1c", "\u2028", "\u3000", "it's", "國破", "7", "!", " a", "e\u0301"])
    )
)
def test_cutting_a_long_text_changes_no_ids(parts):
    text = "".join(parts)
    for tokenizer in (BPE, UNIGRAM):
        whole = tokenizer._backend.encode(text).ids
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pyllm.text.tokenizer._PIECE", 1)
            assert tokenizer.encode(text) == whole


def test_a_long_text_is_cut(monkeypatch):
    from pyllm.text import tokenizer

    pieces = tokenizer._pieces(ENGLISH * 100)
    assert len(pieces) > 1 and "".join(pieces) == ENGLISH * 100
    monkeypatch.setattr(tokenizer, "_PIECE", 100)
    assert Tokenizer.train("bpe:350", [ENGLISH, AWKWARD]).to_json() == BPE.to_json()


def test_saving_and_loading(tmp_path):
    for tokenizer in (CHAR, BPE, UNIGRAM):
        for path in (tmp_path / "tokenizer.json", str(tmp_path / "tokenizer.json")):
            tokenizer.save(path)
            again = Tokenizer.load(path)
            assert again.to_json() == tokenizer.to_json() == pickle.loads(pickle.dumps(tokenizer)).to_json()
            assert again.eos_id == tokenizer.eos_id and again.vocab_size == tokenizer.vocab_size
            assert again.encode("<|endoftext|>" + AWKWARD) == tokenizer.encode("<|endoftext|>" + AWKWARD)
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    CHAR.save(path)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        BPE.save(path)
    assert Tokenizer.load(path).to_json() == CHAR.to_json()
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_files_that_hold_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        Tokenizer.load(tmp_path / "missing.json")
    with pytest.raises(IsADirectoryError):
        Tokenizer.load(tmp_path)
    whole = BPE.to_json().encode()
    path = tmp_path / "tokenizer.json"
    for size in [0, 1, *range(2, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"tokenizer\.json must be JSON, but it is corrupt or truncated"):
            Tokenizer.load(path)
    for data in (b"\xff" + whole, b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="corrupt or truncated"):
            Tokenizer.load(path)
    for data in ("[]", "null", "3", "{}", '{"model": 3}', '{"model": {}}', '{"model": {"type": "BPE"}}'):
        path.write_text(data)
        with pytest.raises(ValueError, match=r"must be a tokenizer\.json, but"):
            Tokenizer.load(path)


def test_what_a_file_asks_for_beside_the_text_is_left_out(tmp_path):
    backend = tokenizers.Tokenizer.from_str(BPE.to_json())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.model.dropout = 0.9
    backend.post_processor = tokenizers.processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode(ENGLISH) == BPE.encode(ENGLISH)
    assert loaded.encode_batch([ENGLISH, "a"]) == BPE.encode_batch([ENGLISH, "a"])


def test_the_same_texts_give_the_same_tokenizer():
    texts, kinds = [PROSE, AWKWARD], ["char", "bpe:340", "unigram:340"]
    ours = [Tokenizer.train(kind, texts).to_json() for kind in kinds]
    for kind, json_ in zip(kinds, ours, strict=True):
        assert Tokenizer.train(kind, iter(texts)).to_json() == json_
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(lambda _, kind=kind: Tokenizer.train(kind, texts).to_json(), range(8))) == {json_}
    program = f"""
import json
from pyllm.text import Tokenizer
print(json.dumps([Tokenizer.train(kind, {texts!a}).to_json() for kind in {kinds!r}]))
"""
    env = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True)
    assert json.loads(out.stdout) == ours


def test_threads_share_a_tokenizer():
    texts = [ENGLISH, AWKWARD, "<|endoftext|>", "the fox"] * 8
    with ThreadPoolExecutor(8) as pool:
        special = pool.map(lambda t: BPE.encode(t, allow_special=True), texts)
        plain = pool.map(BPE.encode, texts)
        assert list(special) == [BPE.encode(t, allow_special=True) for t in texts]
        assert list(plain) == [BPE.encode(t) for t in texts]


@pytest.mark.parametrize("kind", ["char", "bpe:2000", "unigram:2000"])
def test_chinese(poems, kind):
    text = "\n\n".join(poems)
    tokenizer = Tokenizer.train(kind, poems if kind != "char" else text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    check_stream(tokenizer, tokenizer.encode(poems[0]))
    assert len(tokenizer.encode(text)) < len(text.encode()) / 2


@pytest.mark.parametrize("kind", ["char", "bpe:1000"])
def test_english(shared_data, kind):
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text("utf-8")
    tokenizer = Tokenizer.train(kind, text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[:1000] == tokenizer.encode(text[: len(tokenizer.decode(ids[:1000]))])[:1000]


def test_a_tokenizer_of_another_make(shared_data):
    tokenizer = Tokenizer.load(shared_data / "stories260K" / "hf" / "tokenizer.json")
    assert tokenizer.vocab_size == 512 and tokenizer.eos_id is None
    text = "Once upon a time, in the Café 國破 \U0001f469"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    check_stream(tokenizer, ids)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        check_stream(tokenizer, torch.randint(0, 512, (50,), generator=generator).tolist())
