"""Wrong tokenizers, of every format, and wrong chat templates: `cases` yields (what is wrong, kind, {file: bytes})."""

import base64
import copy
import json
import math
import struct
from collections.abc import Iterator

from checkpoint import malformed

SPACE = "\u2581"
DEEP = b"[" * 100_000


def added(id: int, content: str, special: bool = True) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, "special": special, **flags}


def byte_level(add_prefix_space: bool = False) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": True}


BPE = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [added(0, "<unk>"), added(1, "<s>")],
    "normalizer": {"type": "NFC"}, "pre_tokenizer": byte_level(), "decoder": byte_level(),
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
              "vocab": {"<unk>": 0, "<s>": 1, "a": 2, "b": 3, "ab": 4}, "merges": [["a", "b"]]},
}  # fmt: skip
UNIGRAM = BPE | {"model": {"type": "Unigram", "unk_id": 0, "byte_fallback": False,
                           "vocab": [["<unk>", 0.0], ["<s>", 0.0], ["a", -1.0], ["b", -2.0]]}}  # fmt: skip
WORD_PIECE = BPE | {"model": {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##",
                              "max_input_chars_per_word": 100,
                              "vocab": {"<unk>": 0, "<s>": 1, "a": 2, "##b": 3}}}  # fmt: skip
PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), (SPACE, -1.0, 1), ("a", -2.0, 1), ("b", -3.0, 1),
          (SPACE + "a", -1.5, 1)]  # fmt: skip
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##es"]
GPT2 = {"ggml.model": "gpt2", "ggml.tokens": ["a", "b", "ab"], "ggml.merges": ["a b"], "ggml.token_type": [1, 1, 1]}
LLAMA = {"ggml.model": "llama", "ggml.tokens": [p for p, _, _ in PIECES], "ggml.scores": [s for _, s, _ in PIECES],
         "ggml.token_type": [t for _, _, t in PIECES], "ggml.bos_token_id": 1, "ggml.eos_token_id": 2}  # fmt: skip
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def right() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """What the wrong ones are made of."""
    for name, tree in (("bpe", BPE), ("unigram", UNIGRAM), ("word piece", WORD_PIECE)):
        yield name, "tokenizer.json", {"tokenizer.json": text(tree)}
    yield "vocabulary and merges", "vocab.json", pair({"a": 0, "b": 1, "ab": 2}, "a b\n")
    yield "vocab.txt", "vocab.txt", {"vocab.txt": "\n".join(BERT).encode()}
    yield "sentencepiece", "x.model", {"x.model": model()}
    yield "llama2.c", "x.bin", {"x.bin": llama2c()}
    for tree in (GPT2, LLAMA):
        yield f"gguf {tree['ggml.model']}", "m.gguf", vocabulary(tree)
    yield "template", "template", {"template": TEMPLATE.encode()}


def cases() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    for what, data in _json():
        yield what, "tokenizer.json", {"tokenizer.json": data}
    yield from _pairs()
    yield from _word_pieces()
    for what, data in _models():
        yield what, "x.model", {"x.model": data}
    for what, data in _llama2c():
        yield what, "x.bin", {"x.bin": data}
    yield from _gguf()
    yield from _folders()
    for template in TEMPLATES:
        yield template[-60:], "template", {"template": template.encode("utf-8", "surrogatepass")}


def text(tree) -> bytes:
    return json.dumps(tree).encode()


GONE = object()


def changed(tree, path: tuple, value):
    tree = copy.deepcopy(tree)
    at = tree
    for key in path[:-1]:
        at = at[key]
    if value is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return tree


def _json() -> Iterator[tuple[str, bytes]]:
    whole = text(BPE)
    for at in (0, 1, 2, 50, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        yield f"cut at {at}", whole[:at]
    yield "no UTF-8", whole.replace(b"ab", b"\xff")
    yield "half a character", whole.replace(b'"ab"', b'"\\ud800"')
    yield "nested deeply", DEEP
    yield "nested deeply inside", whole.replace(b'"NFC"', b"[" * 50_000 + b"]" * 50_000)
    yield "a token twice", whole.replace(b'"b": 3', b'"b": 3, "a": 3')
    yield "a key twice", whole.replace(b'"version"', b'"model": {}, "version"')
    yield from {"a list": b"[]", "a number": b"3", "nothing": b"{}"}.items()
    changes = {
        "model": [None, 3, {}, {"type": "BPE"}, {"type": "LSTM"}, {"type": 3}, GONE],
        "model.type": ["bpe", None, "Unigram"],
        "model.vocab": [None, [], 3, {"a": -1}, {"a": 1.5}, {"a": "0"}, {"a": 2**32}, {"a": 2**70}, {"a": None}, GONE],
        "model.vocab.ab": [2**31, 2**32 - 1, 2, 2**24],
        "model.merges": [None, 3, "a b", [3], ["a"], ["a c"], ["a b c"], [["a"]], [["a", "c"]], [["a", "b", "c"]],
                         [["b", "a"]], [[2, 3]]],
        "model.unk_token": [3],
        "model.dropout": [-1.0, 2.0, "x"],
        "model.byte_fallback": ["x", 3],
        "added_tokens": [3, {}, ["x"], [3], [{"id": 0}], [added(-1, "x")], [added(2**40, "x")], [added(0, "x")],
                         [added(3_000_000, "x")], [added(5, "")]],
        "normalizer": [3, {"type": "x"}, {}, {"type": "Sequence"}, {"type": "Replace", "pattern": {"Regex": "("},
                                                                    "content": ""},
                       {"type": "Precompiled", "precompiled_charsmap": "?"},
                       {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(3)).decode()},
                       {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 300).decode()},
                       {"type": "Sequence", "normalizers": [
                           {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(CHARSMAP).decode()}]}],
        "pre_tokenizer": [3, {"type": "x"}, {"type": "Sequence", "pretokenizers": [3]},
                          {"type": "Split", "pattern": {"Regex": "["}, "behavior": "Isolated", "invert": False},
                          {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "x", "invert": False}],
        "post_processor": [3, {"type": "x"}, {"type": "TemplateProcessing", "single": [], "pair": [],
                                              "special_tokens": {"<s>": 3}}],
        "post_processor.single": [[{"SpecialToken": {"id": "x", "type_id": 0}}], [{"x": 3}], 3],
        "post_processor.special_tokens": [{}, {"<s>": {"id": "<s>", "ids": [], "tokens": ["<s>"]}},
                                          {"<s>": {"id": "<s>", "ids": [99], "tokens": ["<s>"]}}],
        "decoder": [3, {"type": "x"}, {"type": "Strip", "content": "ab", "start": -1, "stop": 0}],
        "version": ["9.9", 3],
    }  # fmt: skip
    for path, values in changes.items():
        for value in values:
            shown = "gone" if value is GONE else repr(value)[:60]
            yield f"{path} {shown}", text(changed(BPE, tuple(path.split(".")), value))
    for path, values in {"vocab": [[], {}, [["a"]], [["a", "x"]], [[3, 0.0]], [["<unk>", math.nan]],
                                   [["<unk>", 0.0], ["a", math.inf]], [["<unk>", 0.0], ["<unk>", 0.0]]],
                         "unk_id": [4, -1, 2**63, "0", 1.5]}.items():  # fmt: skip
        for value in values:
            yield f"unigram {path} {value!r}", text(changed(UNIGRAM, ("model", path), value))
    for path, values in {"vocab": [{}, {"a": 0}, {"<unk>": -1}, []], "unk_token": ["missing", 3],
                         "max_input_chars_per_word": [-1, "x", 2**70],
                         "continuing_subword_prefix": [3]}.items():  # fmt: skip
        for value in values:
            yield f"word piece {path} {value!r}", text(changed(WORD_PIECE, ("model", path), value))


# A trie of one unit, which points outside of itself.
CHARSMAP = struct.pack("<I", 4) + struct.pack("<I", 0x7FFFFC00) + b"a\0"


def pair(tokens, merges: str | bytes) -> dict[str, bytes]:
    tokens = tokens if isinstance(tokens, bytes) else text(tokens)
    return {"vocab.json": tokens, "merges.txt": merges.encode() if isinstance(merges, str) else merges}


def _pairs() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    good = {"a": 0, "b": 1, "ab": 2}
    for tokens in (
        b"",
        b"{",
        b"[]",
        b"3",
        DEEP,
        b"\xff",
        {},
        {"a": -1},
        {"a": "0"},
        {"a": 0.5},
        {"a": True},
        {"a": 0, "b": 0},
        {**good, "x": 2**31},
        {**good, "x": 10**9},
        {"a": None},
        b'{"a": 0, "b": 1, "ab": 2, "a": 3}',
    ):
        yield f"vocab.json {tokens!r:.60}", "vocab.json", pair(tokens, "#version: 0.2\na b\n")
    for merges in ("a\n", "a b c\n", "a c\n", "b a\n", "c a\n", b"\xff\n", "a  b\n", "a b\nab\n"):
        yield f"merges.txt {merges!r:.60}", "vocab.json", pair(good, merges)
    yield "no merges.txt", "vocab.json", {"vocab.json": text(good)}
    yield "no vocab.json", "merges.txt", {"merges.txt": b"a b\n"}


def _word_pieces() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    good = "\n".join(BERT)
    for what, data in {"empty": "", "no unknown": "[CLS]\n[SEP]\nthe", "a token twice": good + "\nthe",
                       "empty lines": good + "\n\n\nx", "only newlines": "\n" * 50}.items():  # fmt: skip
        yield f"vocab.txt {what}", "vocab.txt", {"vocab.txt": data.encode()}
    yield "vocab.txt no UTF-8", "vocab.txt", {"vocab.txt": good.encode() + b"\n\xff"}
    for config in ({"do_lower_case": 3}, {"strip_accents": "no"}, {"tokenize_chinese_chars": 1}, {"bos_token": 3},
                   {"unk_token": {"content": 3}}, {"chat_template": 3}, {"chat_template": {}},
                   {"added_tokens_decoder": 3}, {"added_tokens_decoder": {"x": {"content": "y"}}},
                   {"added_tokens_decoder": {"99": {"content": "y"}}}, {"added_tokens_decoder": {"5": {"content": 3}}},
                   {"added_tokens_decoder": {"-1": {"content": "y"}}}, {"eos_token": ["x"]}):  # fmt: skip
        files = {"vocab.txt": good.encode(), "tokenizer_config.json": text(config)}
        yield f"vocab.txt with {config}", "tokenizer", files


def _folders() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    good = {"tokenizer.json": text(BPE)}
    for data in (
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff",
        DEEP,
        b'{"bos_token": 3}',
        b'{"eos_token": {}}',
        b'{"chat_template": 1}',
    ):
        yield f"tokenizer_config.json {data[:40]!r}", "tokenizer", good | {"tokenizer_config.json": data}
    for data in (b"[]", b"{", b'{"bos_token": []}'):
        yield f"special_tokens_map.json {data!r}", "tokenizer", good | {"special_tokens_map.json": data}
    for data in (b"[]", b'{"eos_token_id": "2"}', b'{"eos_token_id": [1.5]}', b'{"eos_token_id": {"a": 1}}', b"{"):
        yield f"generation_config.json {data!r}", "tokenizer", good | {"generation_config.json": data}
    yield "chat_template.jinja", "tokenizer", good | {"chat_template.jinja": b"\xff"}
    yield "chat_template.json", "tokenizer", good | {"chat_template.json": b'{"chat_template": [1, 2'}


def varint(number: int) -> bytes:
    data = b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(content: str | bytes, score: float, kind: int) -> bytes:
    content = content if isinstance(content, bytes) else content.encode()
    return field(1, field(1, content) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, kind))


def model(pieces=PIECES, kind: int = 2, training: bytes = b"", form: bytes = b"") -> bytes:
    return b"".join(piece(*p) for p in pieces) + field(2, field(3, kind) + training) + field(3, form)


def _models() -> Iterator[tuple[str, bytes]]:
    whole = model()
    for at in (0, 1, 3, 5, 9, len(whole) - 1, len(whole) - 3):
        yield f"cut at {at}", whole[:at]
    for data in (
        b"\xff" * 20,
        b"\x0b",
        b"\x08\x01",
        b"\x0a\xff\xff\xff\xff\xff\x7f",
        b"\x0a" + varint(2**63),
        b"\x0f" * 9,
    ):
        yield f"bytes {data[:12].hex()}", data
    for what, more in {
        "no UTF-8": ("\xff".encode("latin-1"), 0.0, 1),
        "twice": ("a", 0.0, 1),
        "NaN": ("c", math.nan, 1),
        "infinite": ("c", math.inf, 1),
        "of an unknown type": ("c", 0.0, 9),
        "empty": ("", 0.0, 1),
        "unknown too": ("c", 0.0, 2),
    }.items():
        for kind in (1, 2):
            yield f"a piece {what}, {kind}", model([*PIECES, more], kind)
    yield "a piece of 10,000 characters", model([*PIECES, ("c" * 10_000, 0.0, 1)])
    yield "no unknown", model([p for p in PIECES if p[2] != 2])
    yield "no pieces", model([])
    for kind in (0, 3, 4, 2**40):
        yield f"kind {kind}", model(kind=kind)
    yield "spaces at the end", model(training=field(24, 1))
    yield "spaces as they are", model(form=field(5, 0))
    yield "a piece that is a number", field(1, 7) + whole
    yield "a score of 8 bytes", field(1, field(1, b"c") + varint(2 << 3 | 1) + bytes(8)) + whole
    yield "a type that is a text", field(1, field(1, b"c") + field(3, b"x")) + whole
    for what, charsmap in {"short": bytes(3), "of no trie": bytes(12), "cut": struct.pack("<I", 4096) + bytes(9),
                           "that points outside": CHARSMAP, "huge": struct.pack("<I", 2**32 - 4)}.items():  # fmt: skip
        yield f"a normalisation {what}", model(form=field(2, charsmap))


def llama2c(tokens: int = 300, longest: int = 8, changes: dict[int, bytes] | None = None) -> bytes:
    data = struct.pack("<i", longest)
    for i in range(tokens):
        content = {0: b"<unk>", 1: b"\n<s>\n", 2: b"\n</s>\n"}.get(i, b"<0x%02X>" % (i - 3) if i < 259 else b"t%d" % i)
        content = (changes or {}).get(i, content)
        data += struct.pack("<fi", -float(i), len(content)) + content
    return data


def _llama2c() -> Iterator[tuple[str, bytes]]:
    whole = llama2c()
    for at in (0, 3, 4, 8, 17, len(whole) - 1, len(whole) // 2):
        yield f"cut at {at}", whole[:at]
    yield "few tokens", llama2c(200)
    for longest in (0, -1, 3, -(2**31)):
        yield f"longest {longest}", llama2c(longest=longest)
    for i, content in {0: b"x", 1: b"<s>", 2: b"x", 3: b"<0x01>", 258: b"<0xff>", 270: b"\xff", 271: b"t270",
                       272: b"t" * 9}.items():  # fmt: skip
        yield f"token {i} {content!r}", llama2c(changes={i: content})
    for length in (2**31 - 1, -1, 10**6):
        yield f"a token of {length}", whole[:8] + struct.pack("<i", length) + whole[12:]
    yield "a score that is no number", whole[: -8 - 4] + struct.pack("<f", math.nan) + whole[-8:]
    yield "behind the end", whole + b"\0\0"


def vocabulary(metadata: dict) -> dict[str, bytes]:
    own = {k: v for k, v in malformed.METADATA.items() if not k.startswith("tokenizer")}
    return {"m.gguf": malformed.gguf(own | {f"tokenizer.{k}": v for k, v in metadata.items()})}


def _gguf() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    changes = {
        "ggml.model": [3, "", "rwkv", "bert"], "ggml.tokens": [3, "abc", [1, 2], ["a", "a", "b"], ["a"], [1.0], GONE],
        "ggml.merges": [3, "a b", [1], ["a"], ["a b c"], ["a c"], ["b a"], GONE], "ggml.pre": [3, "new"],
        "ggml.token_type": [3, ["1"], [1], [1.0, 1.0, 1.0], [1, 1, 9]], "ggml.bos_token_id": ["1", 1.0, [1], -1, 10**6],
        "ggml.add_bos_token": ["yes", 1], "chat_template": [3, ["x"]],
    }  # fmt: skip
    for key, values in changes.items():
        for value in values:
            yield (
                f"gpt2 {key} {'gone' if value is GONE else value!r}",
                "m.gguf",
                vocabulary(changed(GPT2, (key,), value)),
            )
    changes = {
        "ggml.scores": [3, [0.0], ["x"], [1] * 3, GONE], "ggml.token_type": [[3] * 7, [1] * 7, [2] * 6],
        "ggml.precompiled_charsmap": ["x", 3, [1, 2, 3], [255] * 40, list(CHARSMAP)], "ggml.add_space_prefix": [1],
        "ggml.tokens": [[SPACE] * 7, GONE], "ggml.eos_token_id": [2**32 - 1, "2"],
    }  # fmt: skip
    for key, values in changes.items():
        for value in values:
            shown = "gone" if value is GONE else f"{value!r:.60}"
            yield f"llama {key} {shown}", "m.gguf", vocabulary(changed(LLAMA, (key,), value))


DOUBLE = "{% set x = 'abcdefgh' %}"
NESTED = "{% set x = ['a', 'b'] %}" + "{% set x = [x, x] %}" * 60
TEMPLATES = [
    # Malformed.
    "{{ 1",
    "{% for x in y %}",
    "{% nothing %}",
    "{{ x | nothing }}",
    "{% endfor %}",
    "{% if %}",
    "{{ }}",
    "{% set %}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "{{ " + "9" * 5000 + " }}",
    "{% for i in x %}" * 60 + "{% endfor %}" * 60,
    "{% if 1 %}" * 3000,
    "a" * 300_000,
    "{{ 1 " * 20_000,
    "{# " * 40_000,
    "{{ 'a",
    "{% macro f( %}",
    "{% raw %}{{ 1",
    "{{ 1 is nothing }}",
    "{{ -" + "-" * 4000 + "1 }}",
    "{{ 1" + " + 1" * 20_000 + " }}",
    "{{ x" + ".x" * 4000 + " }}",
    # Files and modules.
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{% from 'x' import y %}",
    # Attributes that lead out.
    "{{ messages[0].content.nothing.nothing }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ namespace.__init__.__globals__['json'] }}",
    "{{ messages.append(1) }}",
    "{{ lipsum() }}",
    "{{ cycler('a') }}",
    "{{ namespace(__class__=1) }}",
    "{{ range.__self__.x }}",
    "{{ ''['__class__']['__base__'].x }}",
    "{{ [].__class__() }}",
    "{{ self.__init__.__globals__.x }}",
    "{{ (messages | attr('__class__')).x }}",
    "{{ messages.__len__() }}",
    "{{ ''.format.__globals__.x }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{x}'.format_map({'x': 1}) }}",
    "{{ messages | map(attribute='__class__.__name__') | join }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(a=1) }}",
    "{{ messages[0].pop('role') }}",
    "{{ raise_exception.__globals__.x }}",
    "{{ joiner() }}",
    "{{ loop.x.y }}",
    "{% for m in messages %}{{ loop.__init__.__globals__.x }}{% endfor %}",
    "{{ caller.__code__.x }}",
    "{{ ().__hash__() }}",
    "{% set messages = 1 %}{{ messages() }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{{ messages['x'].y }}",
    "{{ {}['a'].b }}",
    "{{ raise_exception('no') }}",
    "{{ [1, 2] | sum('x') }}",
    "{{ 1 | int(base=[]) + 'a' }}",
    "{{ range(1, 2, 0) }}",
    # Without end, or nearly.
    "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "{% for a in range(90000) %}{% for b in range(90000) %}x{% endfor %}{% endfor %}",
    "{% for a in range(90000) %}{{ range(90000) | list | length }}{% endfor %}",
    "{% for a in range(90000) %}{{ messages | tojson }}{% endfor %}",
    "{% for a in range(10**9) %}{% endfor %}",
    "{{ range(10**18) | list }}",
    "{{ range(10**6) | sort | join }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{{ f([n, n]) }}{% endmacro %}{{ f(1) }}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% call x() %}{% endcall %}",
    "{{ 'a' * 10**9 }}",
    "{{ [1] * 10**9 }}",
    "{{ 10 ** 1000000000 }}",
    "{{ 2 ** 64 ** 64 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%s' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'a'.ljust(10 ** 9) }}",
    "{{ 'a'.zfill(10 ** 9) }}",
    "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "{{ 'a'.expandtabs(10 ** 9) }}",
    "{{ 'a'.translate({97: 'a' * 10**7}) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a\nb' | indent(1000000000) }}",
    "{{ 1.5 | round(1000000000, 'floor') }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ 'a' | wordwrap(0) }}",
    "{{ range(90000) | batch(1) | list }}",
    "{{ 'x' | pprint }}",
    "{{ ('a' * 4000000) | list | length }}",
    DOUBLE + "{% set x = x + x %}" * 60,
    DOUBLE + "{% set x = x ~ x %}" * 60,
    DOUBLE + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    DOUBLE + "{% set x = x.replace('a', x) %}" * 60,
    DOUBLE + "{% set x = x | replace('a', x) %}" * 60,
    DOUBLE + "{% set x = [x, x, x] | join(x) %}" * 60,
    DOUBLE + "{% set x = x.join([x, x, x]) %}" * 60,
    DOUBLE + "{% set x = (x, x) | string %}" * 60,
    "{% set x = 3 %}" + "{% set x = x * x %}" * 60,
    NESTED + "{{ x }}",
    NESTED + "{{ x | tojson }}",
    NESTED + "{{ x == x[0] }}",
    "{% set x %}{% for a in range(90000) %}" + "y" * 100_000 + "{% endfor %}{% endset %}",
]
