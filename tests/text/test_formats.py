import json
import pickle
import struct

import pytest
import sentencepiece
import tokenizers
import transformers
from gguf import GGUFReader

from pyllm.text import Tokenizer, TokenizerError

# What llama.cpp's files hold between two texts.
BORDER = "\n__ggml_vocab_test__\n"
TEXT = " Hello  World, it's 1234 \u56fd\u7834 caf\u00e9\n\n\t</s><s><unk>  \U0001f469"


@pytest.fixture(scope="module")
def stories(shared_data):
    return shared_data / "stories260K"


@pytest.fixture(scope="module")
def expected(stories):
    return json.loads((stories / "expected_tokenization.json").read_text("utf-8"))


def metadata(path):
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "bert-bge"])
def test_gguf_vocabularies(shared_data, name):
    path = shared_data / "tokenizers" / f"ggml-vocab-{name}.gguf"
    tokenizer = Tokenizer.from_gguf_metadata(metadata(path))
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split(BORDER)
    lines = path.with_suffix(".gguf.out").read_text("utf-8").split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(text, bos=False) == [int(i) for i in line.split()], text
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.eos_ids == tokenizer.eos_ids
    if name == "llama-spm":
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (2,), True)
        assert tokenizer.encode("a") == [1, *tokenizer.encode("a", bos=False)]
    if name != "bert-bge":
        assert tokenizer.decode(tokenizer.encode(TEXT, bos=False)) == TEXT


def test_a_real_model_as_all_its_files(stories, expected):
    texts = expected["texts"]
    folder = Tokenizer.load(stories / "hf")
    assert (folder.bos_id, folder.eos_id, folder.eos_ids, folder.add_bos) == (1, 2, (2,), True)
    assert [folder.encode(t) for t in texts] == folder.encode_batch(texts) == expected["ids_runc"]
    llama2c = Tokenizer.load(stories / "tok512.bin")
    assert [llama2c.encode(t, bos=True) for t in texts] == expected["ids_runc"]
    for path in (stories / "tok512.model", stories / "hf" / "tokenizer.model"):
        pieces = Tokenizer.load(path)
        assert (pieces.bos_id, pieces.eos_ids) == (1, (2,))
        assert [pieces.encode(t, bos=True) for t in texts] == expected["ids_sentencepiece"]
    gguf = Tokenizer.from_gguf_metadata(metadata(stories / "gguf" / "stories260K-f32.gguf"))
    assert [gguf.encode(t, bos=True) for t in texts] == expected["ids_runc"]


def test_llama_2(shared_data):
    path = shared_data / "tokenizers" / "llama2.model"
    ours, theirs = Tokenizer.load(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in (TEXT, *(shared_data / "tinyshakespeare" / "input.txt").read_text("utf-8")[:200_000].split("\n\n")):
        assert ours.encode(text) == theirs.encode(text)


def test_gpt_2(shared_data, tmp_path):
    folder = shared_data / "tokenizers"
    tokenizer = Tokenizer.load(folder / "encoder.json")
    assert Tokenizer.load(folder / "vocab.bpe").to_json() == tokenizer.to_json()
    assert tokenizer.encode("Hello world") == [15496, 995] and tokenizer.eos_id == 50256
    assert tokenizer.encode("<|endoftext|>", allow_special=True) == [50256]
    for theirs, ours in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (tmp_path / ours).write_bytes((folder / theirs).read_bytes())
    assert Tokenizer.load(tmp_path).encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("squeeze", [False, True])
def test_sentencepiece_models(tmp_path, kind, squeeze):
    text = "The quick brown fox jumps over the lazy dog. \u56fd\u7834 caf\u00e9 it's 1,024\n"
    (tmp_path / "text").write_text(text * 20, "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=330, model_type=kind,
        byte_fallback=True, hard_vocab_limit=False, remove_extra_whitespaces=squeeze, user_defined_symbols=["<sep>"],
        normalization_rule_name="nmt_nfkc" if squeeze else "identity", minloglevel=2, num_threads=1,
    )  # fmt: skip
    ours = Tokenizer.load(tmp_path / "m.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    texts = [text, TEXT, "a\uff21b", "", "  ", "dog<s>", "</s>", "the <unk> fox", "x \U0001f469"]
    for t in texts:
        assert ours.encode(t) == theirs.encode(t), t
    assert (ours.bos_id, ours.eos_ids) == (1, (2,))
    ids = ours.encode("fox<sep>dog")
    assert theirs.piece_to_id("<sep>") in ids


def word_piece(tmp_path, **config):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##es", "[", "]", "cls", "caf\u00e9", "cafe"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(tmp_path)


def test_word_piece(tmp_path):
    lower = word_piece(tmp_path, cls_token="[CLS]")
    assert lower.encode("The foxes caf\u00e9 [CLS]") == [5, 6, 7, 12, 8, 10, 9]
    assert lower.encode("[CLS] the", allow_special=True) == [2, 5]
    assert word_piece(tmp_path, do_lower_case=False).encode("The caf\u00e9") == [1, 11]
    assert word_piece(tmp_path, strip_accents=False).encode("The caf\u00e9") == [5, 11]
    assert Tokenizer.load(tmp_path / "vocab.txt").encode("The") == [5]
    with pytest.raises(ValueError, match="do_lower_case must be true or false"):
        word_piece(tmp_path, do_lower_case=3)


def unigram(special):
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "\u2581<s>/ab")]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, 0))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.add_special_tokens(special)
    return backend


def test_a_likely_control_token_in_text_is_text():
    tokenizer = Tokenizer(unigram(["<unk>", "<s>", "</s>"]), bos_id=1)
    assert tokenizer.encode("a<s>b</s>") == [3, 8, 4, 5, 6, 9, 4, 7, 5, 6]
    assert tokenizer.encode("<s>a</s>", allow_special=True)[:1] == [1]
    assert tokenizer.encode("q") == [3, 0]


def test_a_control_token_that_merges_make_is_text(tmp_path):
    merges = [("<", "s"), ("<s", ">")]
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "<", "s", ">", "<s"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.add_special_tokens(["<s>"])
    assert Tokenizer(backend).encode("<s>") == [5, 4]


def test_a_text_begins_once(stories):
    tokenizer = Tokenizer.load(stories / "hf")
    plain = tokenizer.encode("Once", bos=False)
    assert tokenizer.encode("Once") == tokenizer.encode("<s>Once", allow_special=True) == [1, *plain]
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("<s>Once").count(1) == 1 and len(tokenizer.encode("<s>Once")) > len(plain) + 2
    with pytest.raises(ValueError, match="bos needs a token that begins a text"):
        Tokenizer.train("char", "ab").encode("a", bos=True)


def test_what_a_folder_says(stories, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((stories / "hf" / "tokenizer.json").read_bytes())
    plain = Tokenizer.load(tmp_path)
    assert (plain.bos_id, plain.eos_ids, plain.add_bos, plain.chat_template) == (None, (), False, None)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 2, 9999]}')
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": "x"}]}')
    said = Tokenizer.load(tmp_path)
    assert (said.bos_id, said.eos_ids, said.add_bos, said.chat_template) == (1, (2, 5), True, "x")
    assert said.eos_id == 2
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not Tokenizer.load(tmp_path).add_bos
    for text in ("[]", "{", '{"chat_template": 3}', '{"bos_token": 3}'):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"\[tokenizer\] .*tokenizer_config\.json"):
            Tokenizer.load(tmp_path)


def test_truncated_files(shared_data, tmp_path):
    for source in (shared_data / "stories260K" / "tok512.model", shared_data / "stories260K" / "tok512.bin"):
        whole, path = source.read_bytes(), tmp_path / source.name
        for size in range(0, len(whole), 131):
            path.write_bytes(whole[:size])
            try:
                Tokenizer.load(path)
                assert source.suffix == ".bin"
            except ValueError as e:
                assert str(e).startswith(f"[tokenizer] {path} must be") and "\n" not in str(e)
    path = tmp_path / "x.model"
    for data in (b"", b"\xff" * 20, b"\x0a\xff\xff\xff\xff\xff\x7f", b"\x0b", b"\x0a\x03\x0a\x01\xff", b"\x08\x01"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="must be a sentencepiece model, but"):
            Tokenizer.load(path)
    path = tmp_path / "x.bin"
    for data in (b"", struct.pack("<ifi", 7, 0.0, 1 << 30), struct.pack("<ifi", 1 << 30, 0.0, -1)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"must be a llama2\.c tokenizer, but"):
            Tokenizer.load(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ggml.model": "rwkv"}, "must be gpt2, llama, t5 or bert, but is 'rwkv'"),
        ({"ggml.tokens": None}, "tokens must be there"),
        ({"ggml.tokens": [1]}, "tokens has a value of the wrong type"),
        ({"ggml.tokens": ["a", "a"]}, "'a' is there twice"),
        ({"ggml.token_type": [1]}, "token_type must have 2 entries, but has 1"),
        ({"ggml.merges": ["a"]}, "a merge must be two tokens, but is 'a'"),
        ({"ggml.merges": ["a c"]}, "gives no tokenizer"),
        ({"ggml.pre": "new"}, "to split words 'new' is not known"),
        ({"ggml.bos_token_id": "1"}, "bos_token_id has a value of the wrong type, str"),
        ({"ggml.model": "llama", "ggml.scores": [0.0]}, "scores must have 2 entries"),
        ({"ggml.model": "llama", "ggml.scores": [0.0, 1.0]}, "a piece for what is unknown"),
    ],
)
def test_malformed_gguf_metadata(change, message):
    good = {"ggml.model": "gpt2", "ggml.tokens": ["a", "b"], "ggml.merges": []}
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf_metadata({f"tokenizer.{k}": v for k, v in (good | change).items()})


def test_malformed_pairs(tmp_path):
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    for text, message in (("{}", "there must be tokens"), ('{"a": -1}', "an id from 0"), ('{"a": 1, "b": 1}', "two"),
                          ('{"a": 0}', "a merge must be two tokens"), ("[]", "must be a JSON object")):  # fmt: skip
        (tmp_path / "vocab.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(tmp_path / "vocab.json")


def test_a_normalisation_that_points_outside_is_an_error(tmp_path):
    (tmp_path / "text").write_text("the quick brown fox\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=30, hard_vocab_limit=False,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    path = tmp_path / "m.model"
    whole = path.read_bytes()
    assert Tokenizer.load(path).encode("\uff46\u2460")
    start = whole.index(b"nmt_nfkc") + 16  # in the trie
    for at, byte in ((start, 0xFF), (start + 2, 0xFF), (start + 1024, 0xFF), (start + 4001, 0x7F)):
        path.write_bytes(whole[:at] + bytes([byte] * 64) + whole[at + 64 :])
        with pytest.raises(ValueError, match=r"m\.model must be a sentencepiece model, but: the normalisation"):
            Tokenizer.load(path)


@pytest.mark.parametrize("source", ["hf", "tok512.model", "gguf"])
def test_saving_into_a_folder(stories, tmp_path, source):
    if source == "gguf":
        tokenizer = Tokenizer.from_gguf_metadata(metadata(stories / "gguf" / "stories260K-f32.gguf"))
    else:
        tokenizer = Tokenizer.load(stories / source)
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.__reduce__() == tokenizer.__reduce__()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.chat_template) == (1, 2, tokenizer.chat_template)
    for text in ("Once upon a time", TEXT.replace("<", "(")):
        assert theirs(text)["input_ids"] == tokenizer.encode(text) == again.encode(text)
    (message,) = talk = [{"role": "user", "content": "Hi"}]
    assert again.encode_chat(talk) == [1, *again.encode(message["content"], bos=False)]


def test_a_stream_that_goes_on(stories):
    tokenizer = Tokenizer.load(stories / "tok512.bin")
    assert tokenizer.add_bos and tokenizer.is_control(1) and not tokenizer.is_control(300)
    text = "Once upon \u56fd\u7834 a time \U0001f469 there"
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids) + 1):
        stream = tokenizer.stream(ids[:cut])
        rest = "".join(map(stream.push, ids[cut:])) + stream.flush()
        before = tokenizer.decode(ids[1:cut])
        if "\ufffd" not in before:
            assert before + rest == text


def test_the_frame_of_an_encoder(tmp_path):
    ours = word_piece(tmp_path, cls_token="[CLS]", do_lower_case=True)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    for tokenizer in (ours, Tokenizer.load(tmp_path / "saved")):
        for texts in (("The foxes",), ("the fox", "Caf\u00e9 foxes"), ("",)):
            expected = theirs(*texts)
            assert tokenizer.encode_framed(*texts) == (expected["input_ids"], expected["token_type_ids"])
        assert tokenizer.encode_framed("[SEP]")[0].count(3) == 1
    (tmp_path / "ours").mkdir()
    Tokenizer.load(tmp_path / "saved").save(tmp_path / "ours")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (again.mask_token, again.cls_token, again.sep_token, again.pad_token, again.unk_token) == (
        "[MASK]", "[CLS]", "[SEP]", "[PAD]", "[UNK]")  # fmt: skip
    assert again("the fox", "foxes")["token_type_ids"] == theirs("the fox", "foxes")["token_type_ids"]
    assert Tokenizer.load(tmp_path / "ours").roles == ours.roles == pickle.loads(pickle.dumps(ours)).roles
    likely = unigram(["<unk>", "<s>", "</s>"])
    likely.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    assert Tokenizer(likely).encode_framed("a</s>")[0] == [1, 3, 8, 4, 7, 5, 6, 2]


FRAMED = {
    "T5Tokenizer": ("spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    "XLMRobertaTokenizer": ("sentencepiece.bpe.model", {}),
    "CamembertTokenizer": ("sentencepiece.bpe.model", {}),
    "RobertaTokenizer": ("vocab.json", {}),
    "BartTokenizer": ("vocab.json", {}),
}


@pytest.mark.parametrize("name", FRAMED)
def test_what_only_the_kind_of_a_checkpoint_says(name, tmp_path):
    file, options = FRAMED[name]
    text = "The quick brown fox jumps over the lazy dog. \u56fd\u7834 caf\u00e9 it's 1,024\n"
    (tmp_path / "text").write_text(text * 20, "utf-8")
    if file == "vocab.json":
        trained = Tokenizer.train("bpe:290", text * 20)
        contents = json.loads(trained.to_json())["model"]
        tokens = ["<s>", "<pad>", "</s>", "<unk>", *contents["vocab"], "<mask>"]
        (tmp_path / file).write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in contents["merges"]))
    else:
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=90, hard_vocab_limit=False,
            minloglevel=2, num_threads=1, **options,
        )  # fmt: skip
        (tmp_path / "m.model").rename(tmp_path / file)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    kind = {"T5": "t5", "XLMRoberta": "xlm-roberta", "Bart": "bart"}.get(name.removesuffix("Tokenizer"))
    if kind is not None:  # also where only the model's config says it
        (tmp_path / "tokenizer_config.json").unlink()
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert Tokenizer.load(tmp_path).encode_framed(text) == ours.encode_framed(text)
    for texts in ((text,), ("the quick fox",), ("",), ("fox \u4e00 dog", "a lazy dog"), ("  two  spaces ",)):
        ids, segments = ours.encode_framed(*texts)
        assert ids == theirs(*texts)["input_ids"] and not any(segments), texts
    assert ours.vocab_size == len(theirs)
    assert [ours.token(i) for i in range(len(theirs))] == theirs.convert_ids_to_tokens(list(range(len(theirs))))
    assert ours.unknown_id == (None if file == "vocab.json" else theirs.unk_token_id)  # bytes spell any text
    assert ours.eos_ids[:1] == (theirs.eos_token_id,)
    assert ours.roles.get("mask_token") == theirs.mask_token and ours.roles["pad_token"] == theirs.pad_token
    ours.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode_framed(text, text) == ours.encode_framed(text, text)


def test_pieces_that_are_not_those_of_their_kind(tmp_path, stories):
    contents = (stories / "tok512.model").read_bytes()
    (tmp_path / "sentencepiece.bpe.model").write_bytes(contents[2 + contents[1] :])  # without the first
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    with pytest.raises(TokenizerError, match="the first pieces for xlmroberta must be <unk>, <s>, </s>"):
        Tokenizer.load(tmp_path)
    (tmp_path / "sentencepiece.bpe.model").rename(tmp_path / "spiece.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": -1}))
    with pytest.raises(TokenizerError, match="extra_ids must be from 0 to 10000, but got -1"):
        Tokenizer.load(tmp_path)
