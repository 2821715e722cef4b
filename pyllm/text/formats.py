"""Finds out which kind of tokenizer a file or folder holds, and reads it."""

from __future__ import annotations

import base64
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from pyllm.text import layouts, vocabulary
from pyllm.text.charsmap import check as check_charsmap
from pyllm.text.sentencepiece import read_llama2c, read_model
from pyllm.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

_CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")
_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_BYTES = 1 << 28  # no file of a tokenizer is larger
_FURTHER_ROLES = ("unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
_BERT_ROLES = {role: f"[{role.removesuffix('_token').upper()}]" for role in _FURTHER_ROLES}  # where nothing is said
_ROLES = ("bos_token", "eos_token", *_FURTHER_ROLES)
_ALWAYS_BOS = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizer", "GemmaTokenizerFast")
_MARIAN_ROLES = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
_LARGEST_ID = (1 << 24) - 1
MARIAN = ("source.spm", "target.spm", "vocab.json")
_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model")


class TokenizerError(ValueError):
    """A tokenizer's file or metadata that is truncated or malformed. Its one line names the file, and what is wrong."""


def read(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The library's tokenizer of a file or folder, and the further arguments of Tokenizer that its files give.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file, or no tokenizer in the folder.
        TokenizerError: a file is truncated or malformed.
    """
    return _read_folder(path) if path.is_dir() else _read_file(path, {})


def from_gguf(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The library's tokenizer of a GGUF file's metadata, and the further arguments of Tokenizer."""

    def get(key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.{key}", default)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise ValueError(f"tokenizer.{key} has a value of the wrong type, {type(value).__name__}")
        return value

    def get_list(key: str, kind: type | tuple[type, ...]) -> list | None:
        value = metadata.get(f"tokenizer.{key}")
        if value is None:
            return None
        value = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, kind) for v in value):
            raise ValueError(f"tokenizer.{key} has a value of the wrong type, or in it")
        return list(value)

    model = get("ggml.model", str)
    tokens = get_list("ggml.tokens", str)
    if not tokens:
        raise ValueError("tokenizer.ggml.tokens must be there")
    types = get_list("ggml.token_type", int) or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type must have {len(tokens)} entries, but has {len(types)}")
    if not all(0 <= t <= BYTE for t in types):
        raise ValueError(f"tokenizer.ggml.token_type must hold types from 0 to {BYTE}, but holds another")
    roles = {}
    for role in ("bos", "eos", "eot", "eom", "unknown", "cls"):
        id = get(f"ggml.{role}_token_id", int)
        if id is not None and not 0 <= id < len(tokens):
            raise ValueError(f"tokenizer.ggml.{role}_token_id must be below {len(tokens)}, but is {id}")
        if id is not None:
            roles[role] = id
    control = [tokens[i] for i, t in enumerate(types) if t in (UNKNOWN, CONTROL)]
    user_defined = [tokens[i] for i, t in enumerate(types) if t == USER_DEFINED]
    if model == "gpt2":
        merges = get_list("ggml.merges", str)
        if merges is None:
            raise ValueError("tokenizer.ggml.merges must be there")
        control += [tokens[roles[r]] for r in ("bos", "eos", "eot") if r in roles]
        split = get("ggml.pre", str, "gpt-2")
        backend = vocabulary.byte_level(vocabulary.unique(tokens), _merges(merges), control, user_defined, split)
    elif model in ("llama", "t5"):
        scores = get_list("ggml.scores", (int, float))
        if scores is None or len(scores) != len(tokens):
            raise ValueError(f"tokenizer.ggml.scores must have {len(tokens)} entries")
        if UNKNOWN not in types and "unknown" in roles:
            types[roles["unknown"]] = UNKNOWN
        charsmap = get_list("ggml.precompiled_charsmap", int) or []
        backend = vocabulary.sentence_piece(
            tokens, scores, types, unigram=model == "t5", prefix=get("ggml.add_space_prefix", bool, True),
            squeeze=get("ggml.remove_extra_whitespaces", bool, False), charsmap=bytes(c & 255 for c in charsmap),
        )  # fmt: skip
    elif model == "bert":
        unknown = tokens[roles.get("unknown", 100 if len(tokens) > 100 else 0)]
        backend = vocabulary.word_piece([_bert_token(t) for t in tokens], unknown=unknown, control=control)
    else:
        raise ValueError(f"tokenizer.ggml.model must be gpt2, llama, t5 or bert, but is {model!r}")
    add_bos = get("ggml.add_bos_token", bool)
    if add_bos is None:
        add_bos = model == "llama" or (model == "gpt2" and get("ggml.pre", str, "gpt-2") in ("llama-bpe", "llama3"))
    bos = roles.get("bos")
    arguments = {"bos_id": bos, "add_bos": add_bos and bos is not None, "chat_template": get("chat_template", str),
                 "eos_ids": tuple(dict.fromkeys(roles[r] for r in ("eos", "eot", "eom") if r in roles))}  # fmt: skip
    if arguments["add_bos"]:
        vocabulary.begin_with(backend, roles["bos"])
    return backend, arguments


def _read_folder(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    config: dict[str, Any] = {}
    for name in _CONFIGS:
        if (folder / name).is_file():
            config |= _json_object(folder / name)
    files = ["tokenizer.json", MARIAN[0], *(pair[0] for pair in _PAIRS), *_PIECES, "vocab.txt", "tokenizer.bin"]
    found = next((folder / name for name in files if (folder / name).is_file()), None)
    if found is None:
        raise IsADirectoryError(f"[tokenizer] {folder} is a folder without any of {', '.join(files)}")
    whole = found.name in ("tokenizer.json", MARIAN[0])  # says itself how texts are framed
    model = _json_object(folder / "config.json") if not whole and (folder / "config.json").is_file() else {}
    kind = "" if whole else layouts.kind_of(config, model)
    backend, arguments = _read_file(found, config, kind)
    where = folder / "tokenizer_config.json"
    try:
        if found.name != "tokenizer.json":
            _add_from_config(backend, config)
        tokens = layouts.frame(backend, kind)
        tokens |= {role: _token(config[role]) for role in _ROLES if config.get(role) is not None}
        ids = {role: backend.token_to_id(token) for role, token in tokens.items()}
        further = {role: tokens[role] for role in _FURTHER_ROLES if ids.get(role) is not None}
        arguments["roles"] = arguments.get("roles", {}) | further
        if ids.get("bos_token") is not None:
            arguments["bos_id"] = ids["bos_token"]
        eos = [ids.get("eos_token"), *arguments.get("eos_ids", ())]
        for name in ("generation_config.json", "config.json"):
            if (folder / name).is_file():
                where = folder / name
                theirs = _json_object(where)
                eos += _ids(theirs.get("eos_token_id"), "eos_token_id")
                if arguments.get("bos_id") is None:
                    arguments["bos_id"] = next(iter(_ids(theirs.get("bos_token_id"), "bos_token_id")), None)
        arguments["eos_ids"] = tuple(dict.fromkeys(i for i in eos if _has(backend, i)))
        bos = arguments.get("bos_id")
        arguments["bos_id"] = bos = bos if _has(backend, bos) else None
        add = config.get("add_bos_token")
        if not isinstance(add, bool):
            add = _begins_with(backend, bos) or (not whole and config.get("tokenizer_class") in _ALWAYS_BOS)
        arguments["add_bos"] = add and bos is not None
        if bos is not None and arguments["add_bos"] and not _begins_with(backend, bos):
            vocabulary.begin_with(backend, bos)
        where = folder / "tokenizer_config.json"
        arguments["chat_template"] = _chat_template(folder, config)
    except TokenizerError:
        raise
    except (ValueError, TypeError) as e:
        raise TokenizerError(f"[tokenizer] {where}: {_line(e)}") from None
    return backend, arguments


def _read_file(path: Path, config: dict[str, Any], kind: str = "") -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    name = path.name
    if name == MARIAN[0]:
        return _read_marian(path.parent, config)
    for vocab, merges in _PAIRS:
        if name in (vocab, merges):
            return _read_pair(path.with_name(vocab), path.with_name(merges)), {}
    if name.endswith((".model", ".spm")):
        arrange = functools.partial(layouts.arranged, kind, further=config.get("extra_ids", 100))
        return _with_roles(path, "a sentencepiece model", functools.partial(read_model, arrange=arrange))
    if name.endswith(".bin"):
        backend, arguments = _with_roles(path, "a llama2.c tokenizer", read_llama2c)
        return backend, arguments | {"add_bos": True}  # as run.c does
    if name.endswith(".txt"):
        backend = _read_word_piece(path, config)
        return backend, {"roles": {r: t for r, t in _BERT_ROLES.items() if backend.token_to_id(t) is not None}}
    return _read_json(path), {}


def _read_json(path: Path) -> tokenizers.Tokenizer:
    text, contents = _json(path)
    if not isinstance(contents, dict) or not isinstance(contents.get("model"), dict):
        raise TokenizerError(f"[tokenizer] {path} must be a tokenizer.json, but it has no 'model' object")
    try:
        _check_normalizer(contents.get("normalizer"))
        _check_vocabulary(contents["model"])
        backend = tokenizers.Tokenizer.from_str(text)
        _check_added(backend, contents.get("added_tokens") or ())
        _check_processor(contents.get("post_processor"), backend.get_vocab_size())
        of_bytes = isinstance(backend.model, tokenizers.models.Unigram) and contents["model"].get("byte_fallback")
        if of_bytes and json.dumps(vocabulary.BYTE_BORDER) not in text:
            vocabulary.part_bytes(backend)
        return backend
    except Exception as e:  # the library raises no type more exact than this
        raise TokenizerError(f"[tokenizer] {path} must be a tokenizer.json, but: {_line(e)}") from None


def _check_vocabulary(model: dict[str, Any]) -> None:
    """What the library does not look at: that no two tokens share an id, and that ids and scores are sane."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        _check_ids(vocabulary)
        unknown = model.get("unk_token")
        if unknown is not None and unknown not in vocabulary and model.get("type") == "WordPiece":
            raise ValueError(f"unk_token must be in the vocabulary, but {unknown!r} is not")
    elif isinstance(vocabulary, list):
        pairs = [entry for entry in vocabulary if isinstance(entry, list) and len(entry) == 2]
        if len({token for token, _ in pairs if isinstance(token, str)}) != len(vocabulary):
            raise ValueError("each entry of the vocabulary must be a token of its own and its score")
        if not all(type(score) in (int, float) and math.isfinite(score) for _, score in pairs):
            raise ValueError("each score must be a finite number")


def _check_ids(vocabulary: dict[str, Any]) -> None:
    ids = vocabulary.values()
    if {*map(type, ids)} != {int} or not 0 <= min(ids) <= max(ids) <= _LARGEST_ID:
        raise ValueError(f"there must be tokens, each with an id from 0 to {_LARGEST_ID}")
    if len(set(ids)) != len(vocabulary):
        raise ValueError("two tokens have one id")


def _check_added(backend: tokenizers.Tokenizer, added: Sequence[dict[str, Any]]) -> None:
    """The library gives an added token the next id, whatever its entry says."""
    for entry in added:
        if backend.token_to_id(entry["content"]) != entry["id"]:
            raise ValueError(f"the added token {entry['content']!r:.80} must get the id {entry['id']}, but "
                             f"{backend.token_to_id(entry['content'])} is next")  # fmt: skip


def _check_processor(processor: Any, size: int) -> None:
    """The library frames texts by tokens that may not be there."""
    if not isinstance(processor, dict):
        return
    for step in processor.get("processors", ()):
        _check_processor(step, size)
    framing = processor.get("special_tokens", {})
    ids = [i for token in framing.values() for i in token["ids"] or [-1]]
    ids += [processor[end][1] for end in ("sep", "cls") if end in processor]
    if not all(0 <= i < size for i in ids):
        raise ValueError("its post_processor must add tokens of the vocabulary, but adds others")
    parts = [part["SpecialToken"]["id"] for form in ("single", "pair") for part in processor.get(form, ())
             if "SpecialToken" in part]  # fmt: skip
    if absent := [part for part in parts if part not in framing]:
        raise ValueError(f"its post_processor must say what {absent[0]!r} is, but does not")


def _check_normalizer(normalizer: Any) -> None:
    if isinstance(normalizer, dict):
        charsmap = normalizer.get("precompiled_charsmap")
        if isinstance(charsmap, str):
            check_charsmap(base64.b64decode(charsmap))
        for step in normalizer["normalizers"] if isinstance(normalizer.get("normalizers"), list) else ():
            _check_normalizer(step)


def _read_pair(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    for file, other in ((vocab, merges), (merges, vocab)):
        if other.is_file() and not file.is_file():
            raise TokenizerError(f"[tokenizer] {file} is missing beside {other.name}")
    tokens = _json_object(vocab)
    try:
        _check_ids(tokens)
    except ValueError as e:
        raise TokenizerError(f"[tokenizer] {vocab}: {e}") from None
    lines = _text(merges).split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    control = [t for t in ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>") if t in tokens]
    try:
        return vocabulary.byte_level(tokens, _merges([line.rstrip("\r") for line in lines if line.strip()]), control)
    except Exception as e:
        raise TokenizerError(f"[tokenizer] {merges}: {_line(e)}") from None


def _read_marian(folder: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    if absent := [name for name in MARIAN if not (folder / name).is_file()]:
        raise TokenizerError(f"[tokenizer] {folder / absent[0]} is missing beside {MARIAN[0]}")
    cutters = []
    for name in MARIAN[:2]:
        cutter, _ = _with_roles(folder / name, "a sentencepiece model", read_model)
        if not isinstance(cutter.model, tokenizers.models.Unigram):
            raise TokenizerError(f"[tokenizer] {folder / name} must be a unigram model, as all of Marian's are")
        cutters.append(cutter)
    tokens = _json_object(folder / MARIAN[2])
    try:
        if config.get("separate_vocabs"):
            raise ValueError("it must be the table of both sides, but tokenizer_config.json has separate_vocabs")
        _check_ids(tokens)
        roles = {role: _token(config.get(role) or default) for role, default in _MARIAN_ROLES.items()}
        if absent := [token for token in roles.values() if token not in tokens]:
            raise ValueError(f"it must hold the token {absent[0]!r:.80}")
        backend = vocabulary.table(tokens, roles["unk_token"])
        for each in (backend, *cutters):
            vocabulary.add_tokens(each, roles.values())
    except ValueError as e:
        raise TokenizerError(f"[tokenizer] {folder / MARIAN[2]}: {_line(e)}") from None
    eos, files = tokens[roles.pop("eos_token")], {name: _bytes(folder / name) for name in MARIAN}
    return backend, {"eos_ids": (eos,), "roles": roles, "cutters": cutters, "files": files}


def _read_word_piece(path: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    tokens = _text(path).split("\n")
    tokens = [t.rstrip("\r") for t in (tokens[:-1] if tokens[-1] == "" else tokens)]
    flags = {name: config.get(name) for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars")}
    try:
        for name, flag in flags.items():
            if flag is not None and not isinstance(flag, bool):
                raise ValueError(f"{name} must be true or false, but is {flag!r}")
        return vocabulary.word_piece(tokens, lowercase=flags["do_lower_case"], strip_accents=flags["strip_accents"],
                                     chinese=flags["tokenize_chinese_chars"] is not False)  # fmt: skip
    except Exception as e:
        raise TokenizerError(f"[tokenizer] {path}: {_line(e)}") from None


def _with_roles(path: Path, what: str, read: Callable) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    data = _bytes(path)
    try:
        backend, roles = read(data)
    except Exception as e:
        raise TokenizerError(f"[tokenizer] {path} must be {what}, but: {_line(e)}") from None
    return backend, {"bos_id": roles.get("bos"), "eos_ids": (roles["eos"],) if "eos" in roles else ()}


def _add_from_config(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """The tokens of tokenizer_config.json that the vocabulary lacks, or does not know to be control tokens."""
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise ValueError("added_tokens_decoder must be an object")
    for key, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        token, special = _token(entry), isinstance(entry, dict) and bool(entry.get("special"))
        vocabulary.add_tokens(backend, [token] if special else [], [] if special else [token])
        if backend.token_to_id(token) != int(key):
            raise ValueError(
                f"the added token {token!r} must have the id {key}, but {backend.token_to_id(token)} is next"
            )
    roles = [_token(config[role]) for role in _ROLES if config.get(role) is not None]
    vocabulary.add_tokens(backend, [token for token in roles if backend.token_to_id(token) is not None])


def _begins_with(backend: tokenizers.Tokenizer, bos: int | None) -> bool:
    """Whether the library's own post-processor puts bos first."""
    return bos is not None and backend.encode("", add_special_tokens=True).ids[:1] == [bos]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return _text(folder / "chat_template.jinja")
    template = config.get("chat_template")
    if template is None and (folder / "chat_template.json").is_file():
        template = _json_object(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {t["name"]: t.get("template") for t in template if isinstance(t, dict) and "name" in t}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError("chat_template must be a string")
    return template


def _merges(lines: list[str]) -> list[tuple[str, str]]:
    pairs = [line.split(" ") for line in lines]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"a merge must be two tokens, but is {' '.join(pair)[:80]!r}")
    return [(a, b) for a, b in pairs]


def _bert_token(token: str) -> str:
    """GGUF marks the beginning of words, the library what continues them."""
    if token.startswith("[") and token.endswith("]"):
        return token
    return token[1:] if token.startswith("\u2581") else f"##{token}"


def _token(value: Any) -> str:
    value = value.get("content") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise ValueError(f"a token must be a string, but is {type(value).__name__}")
    return value


def _has(backend: tokenizers.Tokenizer, id: int | None) -> bool:
    return id is not None and 0 <= id <= _LARGEST_ID and backend.id_to_token(id) is not None


def _ids(value: Any, name: str) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{name} must be an id or a list of them")
    return ids


def _json(path: Path) -> tuple[str, Any]:
    try:
        text = _bytes(path).decode("utf-8")
        return text, json.loads(text, object_pairs_hook=_object)
    except TokenizerError:
        raise
    except (ValueError, RecursionError) as e:
        raise TokenizerError(f"[tokenizer] {path} must be JSON, but it is corrupt or truncated: {_line(e)}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object has a key twice")
    return made


def _json_object(path: Path) -> dict[str, Any]:
    _, contents = _json(path)
    if not isinstance(contents, dict):
        raise TokenizerError(f"[tokenizer] {path} must be a JSON object")
    return contents


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise TokenizerError(f"[tokenizer] {path} must be UTF-8, but: {e}") from None


def _bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _BYTES:
            raise TokenizerError(f"[tokenizer] {path} must have at most {_BYTES} bytes, but has {size}")
        return file.read(size)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
