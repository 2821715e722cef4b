"""Makes checkpoint files, and wrong ones of every kind: `cases` yields (what is wrong, kind, {file: bytes})."""

import json
import math
import struct
from collections.abc import Iterator

import numpy as np

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = 16, 24, 2, 4, 2, 32, 8
NUMBERS = (DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT)
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": DIM,
          "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
          "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
          "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True,
          "attention_bias": False, "mlp_bias": False}  # fmt: skip
KV = DIM // HEADS * KV_HEADS
SHAPES = {"model.embed_tokens.weight": (VOCAB, DIM), "model.norm.weight": (DIM,)} | {
    f"model.layers.{i}.{name}.weight": shape
    for i in range(LAYERS)
    for name, shape in {
        "input_layernorm": (DIM,), "self_attn.q_proj": (DIM, DIM), "self_attn.k_proj": (KV, DIM),
        "self_attn.v_proj": (KV, DIM), "self_attn.o_proj": (DIM, DIM), "post_attention_layernorm": (DIM,),
        "mlp.gate_proj": (HIDDEN, DIM), "mlp.up_proj": (HIDDEN, DIM), "mlp.down_proj": (DIM, HIDDEN),
    }.items()
}  # fmt: skip
GGUF_NAMES = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk", "model.": "",
}  # fmt: skip
METADATA = {
    "general.architecture": "llama", "llama.block_count": LAYERS, "llama.embedding_length": DIM,
    "llama.feed_forward_length": HIDDEN, "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS, "llama.context_length": CONTEXT,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.tokens": ["a", "b"],
    "tokenizer.ggml.scores": [0.0, 1.0],
}  # fmt: skip


def values(name: str) -> np.ndarray:
    seed = sum(name.encode())
    return np.random.default_rng(seed).standard_normal(SHAPES[name], np.float32)


def safetensors(names=tuple(SHAPES), changes: dict | None = None, data: bytes | None = None) -> bytes:
    header, begin = {}, 0
    for name in names:
        end = begin + 4 * math.prod(SHAPES[name])
        header[name] = {"dtype": "F32", "shape": list(SHAPES[name]), "data_offsets": [begin, end]}
        begin = end
    for name, change in (changes or {}).items():
        header[name] = header.get(name, {}) | change
    text = json.dumps(header).encode()
    if data is None:
        data = b"".join(values(name).tobytes() for name in names)
    return struct.pack("<Q", len(text)) + text + data


def llama2c(version: int, numbers=NUMBERS) -> bytes:
    def layers(name):
        return [f"model.layers.{i}.{name}.weight" for i in range(LAYERS)]

    products = [n for p in "qkvo" for n in layers(f"self_attn.{p}_proj")]
    products_mlp = [n for p in ("gate", "down", "up") for n in layers(f"mlp.{p}_proj")]
    norm, embedding = ["model.norm.weight"], ["model.embed_tokens.weight"]
    before, after = layers("input_layernorm"), layers("post_attention_layernorm")
    if version == 0:
        order = embedding + before + products + after + products_mlp + norm
        head, tail = struct.pack("<7i", *numbers), bytes(4 * CONTEXT * DIM // HEADS)
    else:
        order = before + after + norm + embedding + products + products_mlp
        head, tail = struct.pack("<Ii7iB", 0x616B3432, version, *numbers, 1).ljust(256, b"\0"), b""
    return head + b"".join(neighbours(name).tobytes() for name in order) + tail


def neighbours(name: str) -> np.ndarray:
    """The weight as llama2.c and GGUF keep it: rotary pairs side by side."""
    weight = values(name)
    heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
    return weight.reshape(heads, 2, -1, DIM).swapaxes(1, 2).reshape(weight.shape) if heads else weight


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(item) -> bytes:
    """A metadata value behind its type; bytes are taken as they are."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, list):
        inner = [value(i) for i in item]
        return struct.pack("<I", 9) + inner[0][:4] + struct.pack("<Q", len(inner)) + b"".join(i[4:] for i in inner)
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item, bool):
        return struct.pack("<IB", 7, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    return struct.pack("<II", 4, item) if item >= 0 else struct.pack("<Ii", 5, item)


def gguf_name(name: str) -> str:
    for theirs, gguf in GGUF_NAMES.items():
        name = name.replace(theirs, gguf)
    return name


def gguf(metadata=METADATA, tensors: dict | None = None, *, magic=b"GGUF", version=3, tensor_count=None,
         pair_count=None, pairs: bytes = b"", infos: bytes = b"", rest: bytes | None = None,
         more: dict[str, np.ndarray] | None = None) -> bytes:  # fmt: skip
    """`tensors` changes {name: (dims, kind, offset)}, where None changes nothing; `pairs`, `infos` are more."""
    names = {name: gguf_name(name) for name in SHAPES}
    table, data = [], b""
    for name, theirs in names.items():
        item = (SHAPES[name][::-1], 0, len(data))
        change = (tensors or {}).get(theirs, (None, None, None))
        dims, kind, offset = (b if a is None else a for a, b in zip(change, item, strict=True))
        table.append(string(theirs) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
                     + struct.pack("<IQ", kind, offset))  # fmt: skip
        data += neighbours(name).tobytes()
        data += bytes(-len(data) % 32)
    for name, array in (more or {}).items():
        table.append(string(name) + struct.pack("<IQIQ", 1, array.size, 0, len(data)))
        data += array.astype(np.float32).tobytes()
        data += bytes(-len(data) % 32)
    head = magic + struct.pack("<IQQ", version, len(table) if tensor_count is None else tensor_count,
                               len(metadata) if pair_count is None else pair_count)  # fmt: skip
    head += b"".join(string(key) + value(item) for key, item in metadata.items()) + pairs + b"".join(table) + infos
    return head + bytes(-len(head) % 32) + (data if rest is None else rest)


def folder(config: dict | bytes, weights: bytes | None = None) -> dict[str, bytes]:
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    return {"config.json": text, "model.safetensors": safetensors() if weights is None else weights}


def cuts(whole: bytes) -> list[int]:
    return [0, 1, 4, 7, 8, 20, 28, 100, 256, len(whole) // 4, len(whole) // 2, len(whole) - 513, len(whole) - 33]


def cases() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    one = safetensors()
    for at in (*cuts(one), len(one) - 1):
        yield f"cut at {at}", "safetensors", {"model.safetensors": one[:at]}
    yield "behind the end", "safetensors", {"model.safetensors": one + b"\0"}
    yield from _safetensors()
    yield from _shards()
    for version in (0, 1):
        whole = llama2c(version)
        for at in (*cuts(whole), len(whole) - 1):
            yield f"v{version} cut at {at}", "llama2c", {"m.bin": whole[:at]}
        yield f"v{version} behind the end", "llama2c", {"m.bin": whole + b"\0"}
        for i, name in enumerate(("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "context")):
            for wrong in (0, -(2**31), 2**31 - 1, NUMBERS[i] + 1):
                if (version, i, wrong) == (1, 6, CONTEXT + 1):
                    continue  # of any size
                numbers = (*NUMBERS[:i], wrong, *NUMBERS[i + 1 :])
                yield f"v{version} {name} {wrong}", "llama2c", {"m.bin": llama2c(version, numbers)}
    whole = llama2c(1)
    yield "v2", "llama2c", {"m.bin": llama2c(2)}
    yield "tied 2", "llama2c", {"m.bin": whole[:36] + b"\2" + whole[37:]}
    yield "not padded by zeros", "llama2c", {"m.bin": whole[:99] + b"\1" + whole[100:]}
    whole = gguf()
    for at in cuts(whole):
        yield f"cut at {at}", "gguf", {"m.gguf": whole[:at]}
    yield "behind the end", "gguf", {"m.gguf": whole + bytes(32)}
    for what, data in _gguf():
        yield what, "gguf", {"m.gguf": data}
    yield from _loaded()


def _safetensors() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    name = "model.norm.weight"
    for length in (2**63, 2**64 - 1, 10**9, 0, 1):
        yield f"header of {length}", "safetensors", {"model.safetensors": struct.pack("<Q", length) + safetensors()[8:]}
    changes = {
        "an unknown dtype": {"dtype": "F31"}, "a wider dtype": {"dtype": "F64"}, "no dtype": {"dtype": None},
        "a negative size": {"shape": [-16]}, "a huge size": {"shape": [2**62]},
        "a huge product": {"shape": [2**40] * 9},
        "a float for a size": {"shape": [16.0]}, "true for a size": {"shape": [True] * 4}, "no shape": {"shape": None},
        "an overlap": {"data_offsets": [0, 64]}, "behind the file": {"data_offsets": [10**9, 10**9 + 64]},
        "huge offsets": {"data_offsets": [2**63, 2**63 + 64]}, "offsets turned": {"data_offsets": [64, 0]},
        "one offset": {"data_offsets": [0]}, "one key more": {"x": 1},
    }  # fmt: skip
    for what, change in changes.items():
        yield what, "safetensors", {"model.safetensors": safetensors(changes={name: change})}
    whole = safetensors()
    for what, new in {"a name twice": b'"model.embed_tokens.weight"', "a NaN": b"NaN", "no JSON": b"}}}"}.items():
        old = b'"model.norm.weight"'
        text = whole[8 : whole.index(b"}}") + 2].replace(old, new)
        yield what, "safetensors", {"model.safetensors": struct.pack("<Q", len(text)) + text + whole[-64:]}
    deep = b"[" * 100_000
    yield "nested deeply", "safetensors", {"model.safetensors": struct.pack("<Q", len(deep)) + deep}


def _shards() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    def sharded(places, **files):
        index = places if isinstance(places, bytes) else json.dumps({"weight_map": places}).encode()
        return {"model.safetensors.index.json": index} | {f"{k}.safetensors": v for k, v in files.items()}

    names = list(SHAPES)
    first, second = names[:5], names[5:]
    places = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    a, b = safetensors(first), safetensors(second)
    for outside in (
        "../a.safetensors",
        "/etc/a.safetensors",
        "x/a.safetensors",
        "..",
        "a.bin",
        "",
        "..\\a.safetensors",
    ):
        yield f"index to {outside!r}", "shards", sharded(places | {first[0]: outside}, a=a, b=b)
    yield "a shard missing", "shards", sharded(places, a=a)
    yield "a shard cut", "shards", sharded(places, a=a, b=b[:-1])
    yield "a weight in another shard", "shards", sharded(places | {first[0]: "b.safetensors"}, a=a, b=b)
    yield "a weight twice", "shards", sharded(places, a=a, b=safetensors([*second, first[0]]))
    yield "a weight nowhere", "shards", sharded(places | {"x": "a.safetensors"}, a=a, b=b)
    yield "a weight not in the index", "shards", sharded({k: v for k, v in places.items() if k != first[0]}, a=a, b=b)
    texts = {
        "no map": b"{}", "a list": b'{"weight_map": []}', "a number": b'{"weight_map": {"x": 1}}', "no JSON": b"{",
        "a name twice": b'{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}',
    }  # fmt: skip
    for what, text in texts.items():
        yield f"index with {what}", "shards", sharded(text, a=a, b=b)


def _gguf() -> Iterator[tuple[str, bytes]]:
    yield "no magic", gguf(magic=b"GGML")
    for version in (0, 1, 4, 3 << 24):
        yield f"version {version}", gguf(version=version)
    for count in (2**63, 2**64 - 1, 10**6, 21, 19):
        yield f"{count} tensors", gguf(tensor_count=count)
    for count in (2**63, 2**64 - 1, 10**6, 11, 9):
        yield f"{count} pairs", gguf(pair_count=count)
    name, u32 = string("x"), struct.Struct("<I").pack
    more = {
        "a key twice": string("llama.block_count") + value(2),
        "a long key": struct.pack("<Q", 2**40),
        "a key that is no UTF-8": string(b"\xff") + value(1),
        "a text that is no UTF-8": name + u32(8) + string(b"\xc3"),
        "a long text": name + u32(8) + struct.pack("<Q", 2**63),
        "an unknown type": name + u32(13) + bytes(8),
        "a boolean of 2": name + u32(7) + b"\2",
        "not a number": name + value(math.nan),
        "an infinite number": name + value(math.inf),
        "an array of unknown type": name + u32(9) + u32(99) + struct.pack("<Q", 1),
        "an array of arrays": name + u32(9) + u32(9) + struct.pack("<Q", 1) + u32(4) + struct.pack("<Q", 0),
        "a huge array of bytes": name + u32(9) + u32(0) + struct.pack("<Q", 2**62),
        "a huge array of numbers": name + u32(9) + u32(10) + struct.pack("<Q", 2**61),
        "a huge array of texts": name + u32(9) + u32(8) + struct.pack("<Q", 2**60),
        "a huge array of booleans": name + u32(9) + u32(7) + struct.pack("<Q", 10**7),
    }
    for what, pairs in more.items():
        yield what, gguf(pair_count=len(METADATA) + 1, pairs=pairs)
    norm = "output_norm.weight"
    changes = {
        "no dimension": ((), None, None), "five dimensions": ((16, 1, 1, 1, 1), None, None),
        "a huge dimension": ((2**63,), None, None), "a huge product": ((2**40, 2**40), None, None),
        "a large product": ((2**20, 2**20), None, None), "a product of 0": ((0, 2**40, 2**40), None, None),
        "one value more": ((25,), None, None), "fewer values": ((8,), None, None),
        "half of a block": (None, 2, None), "packed otherwise": ((16, 2), 8, None), "an old packing": (None, 4, None),
        "an unknown packing": (None, 99, None), "a huge packing": (None, 2**32 - 1, None),
        "an offset not aligned": (None, None, 2049), "an overlap": (None, None, 0),
        "behind the file": (None, None, 2**20), "a huge offset": (None, None, 2**64 - 32),
    }  # fmt: skip
    for what, change in changes.items():
        yield what, gguf(tensors={norm: change})
    info = string(norm) + struct.pack("<IQIQ", 1, 16, 0, 0)
    yield "a tensor twice", gguf(tensor_count=len(SHAPES) + 1, infos=info)
    yield "no data", gguf(rest=b"")
    for alignment in (0, 3, 48, 2**31, "32"):
        yield f"alignment {alignment!r}", gguf(METADATA | {"general.alignment": alignment})
    wrong = {
        "general.architecture": ["mamba", 3], "llama.attention.head_count": [0, 3, 2**31, "4", [4, 4], 4.0],
        "llama.attention.head_count_kv": [0, 5, [2, 2]], "llama.attention.key_length": [2**31, "4"],
        "llama.block_count": [2**31, 2.0, "2"], "llama.embedding_length": [2**31, True],
        "llama.context_length": [2**31], "llama.attention.layer_norm_rms_epsilon": [math.nan, math.inf, 1, "1"],
        "llama.rope.freq_base": [math.nan, 1], "llama.rope.scaling.type": ["other", 1, "linear"],
        "llama.rope.dimension_count": [2], "llama.expert_count": [8],
    }  # fmt: skip
    for key, items in wrong.items():
        for item in items:
            yield f"{key} {item!r}", gguf(METADATA | {key: item})
    for key in METADATA:
        if key.startswith(("general", "llama")) and not key.endswith("head_count_kv"):
            yield f"no {key}", gguf({k: v for k, v in METADATA.items() if k != key})


def _loaded() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """What only shows when a model is made."""

    wrong = {
        "model_type": [None, 3, "mamba", ["llama"]], "architectures": [["GPT2LMHeadModel"], 3],
        "auto_map": [{"AutoModelForCausalLM": "code.Model"}],
        "hidden_size": [math.nan, math.inf, 0, -16, 2**31, 2**62, 2**70, "16", 16.0, [16], None, True, 17],
        "num_hidden_layers": [0, 1, 3, -1, 10**9, 2**70, "2", None, math.nan], "vocab_size": [0, 31, 33, 2**40, "x"],
        "num_attention_heads": [0, 3, 5, 2**40, None, "4"], "num_key_value_heads": [0, 3, 8, 2**40, {}],
        "intermediate_size": [0, 25, 2**62, None], "rms_norm_eps": [math.nan, -1.0, "x", {}],
        "rope_theta": [math.nan, math.inf, -1, 0, "x"], "hidden_act": ["x", 3,""],
        "max_position_embeddings": [0, -1, 2**70, 1.5], "tie_word_embeddings": [False, 3, "x"],
        "rope_scaling": [3, [1], {"rope_type": "x"}, {"rope_type": "linear"}, {"rope_type": "linear", "factor": "x"}],
        "head_dim": [0, 5, 2**40, "x"],
    }  # fmt: skip
    for key, items in wrong.items():
        for item in items:
            if item is not None or key in ("model_type", "hidden_size", "num_attention_heads", "intermediate_size"):
                yield f"{key} {item!r}", "folder", folder(CONFIG | {key: item})
    texts = {
        "empty": b"", "no object": b"[]", "cut": json.dumps(CONFIG).encode()[:-1], "no UTF-8": b"\xff",
        "nested deeply": b'{"a":' * 100_000, "a key twice": b'{"model_type": "llama", "model_type": "llama"}',
    }  # fmt: skip
    for what, text in texts.items():
        yield f"config {what}", "folder", folder(text)
    yield "no weights", "folder", {"config.json": json.dumps(CONFIG).encode()}
    names = list(SHAPES)
    yield "a weight missing", "folder", folder(CONFIG, safetensors(names[1:]))
    zeros = safetensors(changes={"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
    yield "a weight more", "folder", folder(CONFIG, zeros)
    turned = safetensors(changes={"model.embed_tokens.weight": {"shape": [DIM, VOCAB]}})
    yield "a weight turned", "folder", folder(CONFIG, turned)
    whole = safetensors(changes={"model.embed_tokens.weight": {"dtype": "I32"}})
    yield "whole numbers", "folder", folder(CONFIG, whole)
    for what, data in {"empty": b"", "no pickle": b"x" * 99, "cut": b"PK\3\4" + bytes(40),
                       "code": b"cos\nsystem\n(S'exit 3'\ntR."}.items():  # fmt: skip
        yield f"pickle {what}", "folder", {"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": data}
    for outside in ("../pytorch_model.bin", "/dev/zero", "x.safetensors", "none.bin", 3):
        index = json.dumps({"weight_map": {"x": outside}}).encode()
        files = {"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin.index.json": index}
        yield f"pickle index to {outside!r}", "folder", files
    for key, item in (("block_count", 1), ("block_count", 3), ("block_count", 10**7), ("feed_forward_length", 25)):
        yield f"loaded {key} {item}", "m.gguf", {"m.gguf": gguf(METADATA | {f"llama.{key}": item})}
    tensors = METADATA | {"tokenizer.ggml.model": "x"}
    yield "an unknown tokenizer", "m.gguf", {"m.gguf": gguf(tensors)}
    yield (
        "a tokenizer of wrong sizes",
        "m.gguf",
        {"m.gguf": gguf(METADATA | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]})},
    )
    yield "no format", "m.bin", {"m.bin": b"\x80\x02" + bytes(300)}
    yield "a text", "m.txt", {"m.txt": b"Once upon a time"}
