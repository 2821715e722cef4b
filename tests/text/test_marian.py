"""Marian's tokenizers, of two sentencepiece models and a table, against transformers."""

import json
import pickle
import random

import pytest
import sentencepiece
import transformers

import pyllm
from pyllm.text import MarianTokenizer, Tokenizer, TokenizerError

ENGLISH = "The quick brown fox jumps over the lazy dog. How many cats and dogs did it see, 3? It's \u201cfine\u201d.\n"
GERMAN = "Der schnelle braune Fuchs springt \u00fcber den faulen Hund. Wie viele sah er, 3? \u00c4pfel, Stra\u00dfe.\n"
TEXTS = ["The fox saw dogs.", "  two  spaces \t and\nlines ", "", " ", "\u00c4pfel \u00fcber \u56fd\u7834 stra\u00dfe",
         "the \u56fd fox", ">>deu<< the fox", ">>fra<<the fox", ">>xxx<< the fox", ">> the fox", "the >>deu<< fox",
         ">>a\nb<< c", "\u201cquoted\u201d", "x \U0001f469\u200d\U0001f680 \uff21"]  # fmt: skip


def make(folder, kind="unigram", **config):
    pieces = []
    for name, text, size in (("source", ENGLISH, 75), ("target", GERMAN, 70)):
        (folder / "text").write_text(text * 20, "utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"), model_prefix=str(folder / name), vocab_size=size, model_type=kind,
            hard_vocab_limit=False, minloglevel=2, num_threads=1, bos_id=-1,
        )  # fmt: skip
        (folder / f"{name}.model").rename(folder / f"{name}.spm")
        for leftover in ("text", f"{name}.vocab"):
            (folder / leftover).unlink()
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{name}.spm"))
        pieces += [model.id_to_piece(i) for i in range(model.vocab_size())]
    pieces = sorted({*pieces, ">>deu<<", ">>fra<<"} - {"<unk>", "</s>", "q", "x"})
    random.Random(0).shuffle(pieces)
    tokens = ["</s>", "<unk>", *pieces, "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"source_lang": "eng", "target_lang": "deu"} | config))
    return tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("marian")
    make(made)
    return made


@pytest.fixture(scope="module")
def theirs(folder):
    with pytest.warns(UserWarning, match="sacremoses"):
        return transformers.MarianTokenizer.from_pretrained(folder)


def test_ids_and_texts_are_those_of_transformers(folder, theirs):
    ours = Tokenizer.load(folder)
    assert isinstance(ours, MarianTokenizer)
    assert (ours.bos_id, ours.eos_ids, ours.unknown_id) == (None, (0,), 1) and len(ours) == len(theirs)
    known = 0
    for tokenizer in (ours, pickle.loads(pickle.dumps(ours))):
        for text in TEXTS:
            expected = theirs(text)["input_ids"]
            ids, segments = tokenizer.encode_framed(text)
            assert ids == expected and tokenizer.encode(text) == expected[:-1] and segments == [0] * len(ids), text
            target = theirs(text_target=text)["input_ids"]
            assert tokenizer.targets.encode_framed(text)[0] == target, text
            if 1 not in ids:
                assert tokenizer.decode(ids[:-1]) == theirs.decode(expected, skip_special_tokens=True), text
                known += 1
        assert tokenizer.encode_batch(TEXTS) == [theirs(text)["input_ids"][:-1] for text in TEXTS]
    assert known >= 6
    assert ours.targets.encode(ENGLISH + GERMAN) != ours.encode(ENGLISH + GERMAN) and 1 in ours.encode("quick")
    assert 0 not in ours.encode("a </s>") and ours.encode("a </s>", allow_special=True)[-1] == 0
    assert ours.encode("a <pad>", allow_special=True)[-1] == len(ours) - 1


def test_a_model_translates_as_there_and_leaves_with_its_tokenizer(folder, theirs, tmp_path):
    import torch

    size = len(theirs)
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=size, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64, init_std=0.3,
        pad_token_id=size - 1, eos_token_id=0, decoder_start_token_id=size - 1, forced_eos_token_id=0,
    )  # fmt: skip
    model = transformers.MarianMTModel(config).eval()
    model.generation_config.bad_words_ids = [[size - 1]]
    model.generation_config.num_beams = 1
    model.save_pretrained(tmp_path / "theirs")
    for name in ("source.spm", "target.spm", "vocab.json", "tokenizer_config.json"):
        (tmp_path / "theirs" / name).write_bytes((folder / name).read_bytes())
    ours, tokenizer = pyllm.load(tmp_path / "theirs")
    pyllm.export(ours, tmp_path / "exported", tokenizer)
    pyllm.save(ours, tmp_path / "saved", tokenizer)
    for name in ("source.spm", "target.spm", "vocab.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (folder / name).read_bytes()
    with pytest.warns(UserWarning, match="sacremoses"):
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert type(again).__name__ == "MarianTokenizer"
    text = "The lazy dog saw 3 cats."
    assert again(text)["input_ids"] == theirs(text)["input_ids"]
    ids = model.generate(**theirs(text, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    expected = theirs.decode(ids[0], skip_special_tokens=True)
    for which in ("theirs", "exported", "saved"):
        found = pyllm.generate(*pyllm.load(tmp_path / which), text, max_tokens=12, temperature=0)
        assert found.strip() == expected and expected


def test_what_is_refused(folder, tmp_path):
    def copied(**changed):
        for name in ("source.spm", "target.spm", "vocab.json", "tokenizer_config.json"):
            contents = changed.get(name.replace(".", "_"), (folder / name).read_bytes())
            (tmp_path / name).unlink(missing_ok=True)
            if contents is not None:
                (tmp_path / name).write_bytes(contents)

    table = json.loads((folder / "vocab.json").read_text())
    for changed, message in (
        ({"target_spm": None}, r"target\.spm is missing beside source\.spm"),
        ({"vocab_json": None}, r"vocab\.json is missing beside source\.spm"),
        ({"source_spm": (folder / "source.spm").read_bytes()[:300]}, r"source\.spm must be a sentencepiece model, but"),
        ({"target_spm": b"\xff"}, r"target\.spm must be a sentencepiece model, but"),
        ({"vocab_json": json.dumps(table | {"<pad>": 0}).encode()}, "two tokens have one id"),
        ({"vocab_json": json.dumps({"a": 0}).encode()}, "it must hold the token '<unk>'"),
        ({"tokenizer_config_json": b'{"separate_vocabs": true}'}, "table of both sides"),
        ({"tokenizer_config_json": b'{"pad_token": 7}'}, "a token must be a string"),
    ):
        copied(**changed)
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.load(tmp_path)
    make(tmp_path, "bpe")
    with pytest.raises(TokenizerError, match=r"source\.spm must be a unigram model"):
        Tokenizer.load(tmp_path)
    ours = Tokenizer.load(folder)
    with pytest.raises(ValueError, match="is saved into a folder"):
        ours.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"no tokenizer\.json says"):
        ours.to_json()
