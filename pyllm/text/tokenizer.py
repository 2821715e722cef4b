from __future__ import annotations

import functools
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pyllm.text import formats

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
_KINDS = "the kinds are: char, bpe:SIZE, unigram:SIZE"
_PIECE = 1 << 16
_MARK = "\ufdd0"  # no character: keeps apart the letters of a control token that a message spells out


class Tokenizer:
    """Text to token ids and back, over a tokenizer of the `tokenizers` library, which does all the work.

    Made by `train`, `load` or `from_gguf_metadata`. Text never turns into control tokens unless `encode` is told so. No
    tokens are added that the text does not hold, but for the one that begins each text (BOS) where the checkpoint asks
    for it. Safe to share between threads, and to pickle.

    Attributes:
        bos_id: the id of the token that begins a text, if there is one.
        add_bos: whether `encode` puts it there.
        eos_ids: all ids that end a text.
        chat_template: how a conversation is written as text, in Jinja, if the checkpoint says it.
        roles: further tokens by what they are for, as transformers names it: {"mask_token": "[MASK]", ...}.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, bos_id: int | None = None, eos_ids: Sequence[int] = (),
                 add_bos: bool = False, chat_template: str | None = None,
                 roles: Mapping[str, str] | None = None):  # fmt: skip
        # A file may ask for truncation, padding and chance, which would change texts in silence.
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None
        backend.encode_special_tokens = True
        self._backend = backend
        self._encoder = backend
        self._special: tokenizers.Tokenizer | None = None
        self._control = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        end = backend.token_to_id(END_OF_TEXT)
        self.eos_ids = tuple(eos_ids) or (() if end is None else (end,))
        self.bos_id, self.add_bos, self.chat_template = bos_id, add_bos, chat_template
        self.roles = dict(roles or {})

    @classmethod
    def train(cls, kind: str, texts: str | Iterable[str]) -> Tokenizer:
        """Makes a tokenizer for texts; the same texts give the same tokenizer.

        Args:
            kind: "char", one id for each character of texts, <unk> for all others; "bpe:SIZE", byte-pair encoding
                (Sennrich et al., 2016, https://arxiv.org/abs/1508.07909), or "unigram:SIZE", the likeliest pieces
                (Kudo, 2018, https://arxiv.org/abs/1804.10959), of SIZE tokens. Those two are of bytes, in words as
                GPT-2 splits them, and lossless on any text. All have the end-of-text token <|endoftext|>.
            texts: one text or several.

        Raises:
            ValueError: an unknown kind, no text, or a SIZE that is too small for the bytes or too large for the texts.
        """
        sized = re.fullmatch(r"(bpe|unigram):([0-9]{1,18})", kind)
        if kind != "char" and not sized:
            raise ValueError(f"[tokenizer] {kind!r} is not a kind of tokenizer; {_KINDS}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            _check_text(text)
        if not any(texts):
            raise ValueError("[tokenizer] training needs text, but got none")
        return cls(_train_pieces(sized[1], int(sized[2]), texts) if sized else _train_char(texts))

    def encode(self, text: str, *, allow_special: bool = False, bos: bool | None = None) -> list[int]:
        """The token ids of text.

        With allow_special, control tokens spelled out in text, such as <|endoftext|>, become their ids; otherwise they
        are text like any other. Lone surrogates, which no UTF-8 text holds, are a ValueError.

        With bos, or where it is None and `add_bos` is set, the ids begin with `bos_id`: once, also where the text
        begins with it already, as chat templates do.
        """
        _check_text(text)
        backend = self._with_special() if allow_special else self._plain
        pieces = _pieces(text) if self._divisible else [text]
        ids = [i for part in self._encode(backend, pieces) for i in part]
        return self._begin(ids, bos)

    def encode_batch(self, texts: Iterable[str], *, allow_special: bool = False,
                     bos: bool | None = None) -> list[list[int]]:  # fmt: skip
        """The token ids of each text, as `encode` gives them; the texts are shared out over the processors."""
        texts = list(texts)
        for text in texts:
            _check_text(text)
        backend = self._with_special() if allow_special else self._plain
        return [self._begin(ids, bos) for ids in self._encode(backend, texts)]

    def encode_framed(self, text: str, second: str | None = None) -> tuple[list[int], list[int]]:
        """The ids of a text, or of a pair of texts, in the frame that the checkpoint's tokenizer.json gives it.

        For encoders, such as [CLS] text [SEP] second [SEP] for BERT. Returns the ids and, of each, the segment: 0, or 1
        where it belongs to the second text. Control tokens spelled out in the texts are text.
        """
        for t in (text, *([] if second is None else [second])):
            _check_text(t)
        encoding = self._plain.encode(text, second, add_special_tokens=True)
        return encoding.ids, encoding.type_ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens spelled out, bytes that are no UTF-8 as U+FFFD. ids may be a 1-D tensor.

        Raises:
            IndexError: an id outside the vocabulary.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if ids and not (min(ids) >= 0 and max(ids) < self._size):
            wrong = next(i for i in ids if not 0 <= i < self._size)
            raise IndexError(f"[decode] ids must be in [0, {self._size}), but got {wrong}")
        return self._backend.decode(ids, skip_special_tokens=False)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True,
                            tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any) -> str:  # fmt: skip
        """The text of a conversation as `chat_template` writes it; see `pyllm.text.chat.render`. Needs jinja2.

        Raises:
            ChatTemplateError, a ValueError: there is no template, it is malformed, it refuses the conversation, or it
                exceeds its limits.
        """
        from pyllm.text import chat  # jinja2 is an extra

        if self.chat_template is None:
            raise chat.ChatTemplateError("[chat] this tokenizer has no chat template")
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        tokens = {name: self.token(id) for name, id in names.items() if id is not None}
        return chat.render(self.chat_template, messages, add_generation_prompt=add_generation_prompt, tools=tools,
                           **(tokens | variables))  # fmt: skip

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> list[int]:
        """The ids of a conversation: of what `apply_chat_template` writes, and nothing else.

        Control tokens that the template writes are such, those spelled out in messages or tools are text.
        """
        control = {t.content: i for i, t in self._backend.get_added_tokens_decoder().items() if t.special}
        names = sorted(control, key=len, reverse=True)
        spelled = re.compile("|".join(map(re.escape, names)) or "(?!)")
        marked = [_mark(m, spelled) for m in messages]
        if arguments.get("tools"):
            arguments["tools"] = _mark(arguments["tools"], spelled)
        text = self.apply_chat_template(marked, **arguments)
        if _MARK not in text:
            return self.encode(text, allow_special=True, bos=False)
        ids, position = [], 0
        for found in spelled.finditer(text):
            ids += self.encode(text[position : found.start()].replace(_MARK, ""), bos=False)
            ids.append(control[found[0]])
            position = found.end()
        return ids + self.encode(text[position:].replace(_MARK, ""), bos=False)

    def stream(self, after: Sequence[int] = ()) -> Detokenizer:
        """Decodes ids one at a time; with `after`, as what goes on behind these ids, whose text is not said again.

        Some tokenizers drop the space before the first word: a continuation keeps it.
        """
        return Detokenizer(self, after)

    @property
    def vocab_size(self) -> int:
        """The number of ids: all are below it."""
        return self._size

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The id of text that the vocabulary cannot spell; None where it can spell any."""
        if isinstance(self._backend.model, models.Unigram):
            return json.loads(self.to_json())["model"]["unk_id"]
        unknown = getattr(self._backend.model, "unk_token", None)
        return None if unknown is None else self._backend.token_to_id(unknown)

    @property
    def eos_id(self) -> int | None:
        """The first of eos_ids, <|endoftext|> where nothing else is said; None where there is no such token."""
        return self.eos_ids[0] if self.eos_ids else None

    def token(self, id: int) -> str | None:
        """How the vocabulary spells an id (bytes as GPT-2's printable stand-ins); None where it has no such id."""
        return self._backend.id_to_token(id) if 0 <= id < self._size else None

    def is_control(self, id: int) -> bool:
        """Whether an id is a control token, which no plain text becomes."""
        return id in self._control

    def to_json(self) -> str:
        """The contents of tokenizer.json."""
        return self._backend.to_str()

    def save(self, path: str | os.PathLike) -> None:
        """Writes tokenizer.json: whole or, if interrupted, not at all.

        Into a folder, with tokenizer_config.json beside it, which holds what tokenizer.json has no place for: the
        tokens that begin and end a text, the further roles, and the chat template. Where several tokens end a text, it
        has only the first; the others belong in the model's generation_config.json.
        """
        path = Path(path)
        if path.is_dir():
            write_file(path / "tokenizer.json", self.to_json().encode())
            write_config(path, self.config())
        else:
            write_file(path, self.to_json().encode())

    def config(self) -> dict[str, Any]:
        """The contents of tokenizer_config.json, as transformers reads it."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.add_bos,
                                  "clean_up_tokenization_spaces": False} | self.roles  # fmt: skip
        if "sep_token" in self.roles and 1 in self._plain.encode("", "", add_special_tokens=True).type_ids:
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        for name, id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if id is not None:
                config[name] = self.token(id)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return config

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Reads a tokenizer from the file or folder of a checkpoint.

        Args:
            path: a tokenizer.json; GPT-2's vocab.json and merges.txt, or encoder.json and vocab.bpe, by either's name;
                WordPiece's vocab.txt; a sentencepiece .model; llama2.c's .bin. Or a folder with one of them, or with
                Marian's source.spm, target.spm and vocab.json, which give a `MarianTokenizer`: then the files beside it
                (tokenizer_config.json, special_tokens_map.json, generation_config.json, ...) give `bos_id`, `add_bos`,
                `eos_ids` and `chat_template`.

        Raises:
            FileNotFoundError, IsADirectoryError: there is no such file, or no tokenizer in the folder.
            TokenizerError, a ValueError: a file is truncated, malformed, or holds no tokenizer.
        """
        from pyllm.text.marian import MarianTokenizer  # which is one of these

        backend, arguments = formats.read(Path(path))
        return (MarianTokenizer if "cutters" in arguments else cls)(backend, **arguments)

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer of a GGUF file, whose metadata ("tokenizer.ggml.model", ...) is given as plain values.

        Raises:
            TokenizerError, a ValueError: an entry is missing, malformed or of a kind that is not known.
        """
        try:
            backend, arguments = formats.from_gguf(metadata)
            return cls(backend, **arguments)
        except Exception as e:  # the library raises no type more exact than this
            why = " ".join(str(e).split())[:300]
            raise formats.TokenizerError(f"[tokenizer] this GGUF metadata gives no tokenizer: {why}") from None

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"Tokenizer({type(self._backend.model).__name__}, vocab_size={self._size})"

    def __reduce__(self):
        return _from_json, (self.to_json(), self._arguments())

    # What follows is made when it is asked for: of a large vocabulary, that takes longer than reading the file.

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return without_control(self._encoder)

    @functools.cached_property
    def _size(self) -> int:
        count = self._backend.get_vocab_size(with_added_tokens=True)
        if None not in map(self._backend.id_to_token, range(count)):
            return count
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def _divisible(self) -> bool:
        return _divisible(self._backend)

    def _arguments(self) -> dict[str, Any]:
        return {"bos_id": self.bos_id, "eos_ids": self.eos_ids, "add_bos": self.add_bos,
                "chat_template": self.chat_template, "roles": self.roles}  # fmt: skip

    def _encode(self, backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _begin(self, ids: list[int], bos: bool | None) -> list[int]:
        if not (self.add_bos if bos is None else bos):
            return ids
        if self.bos_id is None:
            raise ValueError("[tokenizer] bos needs a token that begins a text, but this tokenizer has none")
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def _with_special(self) -> tokenizers.Tokenizer:
        # The switch is a property of the library's object, so each setting needs an object of its own.
        if self._special is None:
            special = tokenizers.Tokenizer.from_str(self._encoder.to_str())
            special.encode_special_tokens = False
            self._special = special
        return self._special


class Detokenizer:
    """Turns a stream of ids into a stream of text: `push` each id, then `flush`.

    What they return adds up to `decode` of all the ids. Text comes as soon as no later id can change it.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the ids of the text said last, then those whose text is held back
        self._read = 0  # how many of them are said
        self._said = ""  # their text
        if len(after) and not tokenizer.is_control(after[-1]):
            # The last id is enough, but in the middle of a character.
            count = 1
            while count < min(len(after), 64) and "\ufffd" in tokenizer.decode(after[-count:])[:1]:
                count += 1
            self._ids, self._read = list(after[-count:]), count
            self._said = tokenizer.decode(self._ids)

    def push(self, id: int) -> str:
        """The text that id makes final: often its own, "" in the middle of a character.

        Raises:
            IndexError: an id outside the vocabulary; the stream is as it was before.
        """
        text = self._tokenizer.decode([*self._ids, id])
        self._ids.append(id)
        # U+FFFD at the end may be the beginning of a character, and a run of byte tokens is decoded as a whole.
        if text.endswith("\ufffd") or re.fullmatch("<0x[0-9A-F]{2}>", self._tokenizer.token(id) or ""):
            return ""
        new = text[len(self._said) :]
        # What came before is decoded along, as a token's text may depend on whether it is the first.
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._said = self._tokenizer.decode(self._ids)
        return new

    def flush(self) -> str:
        """The text that was held back; the next push begins a new stream."""
        rest = self._tokenizer.decode(self._ids)[len(self._said) :]
        self._ids, self._read, self._said = [], 0, ""
        return rest


def _train_char(texts: list[str]) -> tokenizers.Tokenizer:
    characters = sorted(set().union(*texts))
    vocabulary = {token: i for i, token in enumerate([UNKNOWN, END_OF_TEXT, *characters])}
    # Byte-pair encoding of characters without a single merge.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    backend.add_special_tokens([END_OF_TEXT])
    backend.decoder = decoders.Fuse()
    return backend


def _train_pieces(kind: str, size: int, texts: list[str]) -> tokenizers.Tokenizer:
    least = 256 + 1
    if size < least:
        raise ValueError(
            f"[tokenizer] {kind}:SIZE must be at least {least} (256 bytes and {END_OF_TEXT}), but got {size}"
        )
    # Each merge needs a place in the text; without this bound the trainer would allocate what was asked for.
    made = most = least + sum(len(text.encode()) for text in texts)
    if size <= most:
        backend = _of_bytes(models.BPE() if kind == "bpe" else models.Unigram())
        trainer = (trainers.BpeTrainer if kind == "bpe" else trainers.UnigramTrainer)(
            vocab_size=size, special_tokens=[END_OF_TEXT], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        backend.train_from_iterator([piece for text in texts for piece in _pieces(text)], trainer)
        made = backend.get_vocab_size()
    if made < size:
        raise ValueError(f"[tokenizer] {kind}:{size} needs more text: these texts give at most {made} tokens")
    return backend if kind == "bpe" else _ordered(backend)


def _of_bytes(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _ordered(trained: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The trainer adds up in any order, and gives bytes that it met too rarely the least score and a bit more, in any
    order: without the last digits, without the bits, and sorted, the same texts give the same."""
    scores = dict(json.loads(trained.to_str())["model"]["vocab"][1:])
    least = min(scores.values())
    for piece, score in scores.items():
        bits = (score - least) * 1e4
        scores[piece] = round(least if len(piece) == 1 and bits < 257 and abs(bits - round(bits)) < 0.01 else score, 6)
    pieces = sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))
    backend = _of_bytes(models.Unigram([(END_OF_TEXT, 0.0), *pieces], None, False))
    backend.add_special_tokens([END_OF_TEXT])
    return backend


def _divisible(backend: tokenizers.Tokenizer) -> bool:
    """Whether the ids of `_pieces` add up to the ids of the text: so for what `train` makes."""
    before = backend.pre_tokenizer
    if backend.normalizer is not None or not isinstance(backend.model, (models.BPE, models.Unigram)):
        return False
    if before is None and isinstance(backend.model, models.BPE):
        tokens = backend.get_vocab(with_added_tokens=True)
        return all(len(token) == 1 or token in (UNKNOWN, END_OF_TEXT) for token in tokens)
    return isinstance(before, pre_tokenizers.ByteLevel) and before.use_regex and not before.add_prefix_space


def _pieces(text: str) -> list[str]:
    """Cuts a long text, so that it is worked on in parallel and in less memory.

    The cuts are before newlines that a word follows: there GPT-2's way of splitting words always has a border, and
    what is on one side has no influence on the other.
    """
    if len(text) <= _PIECE:
        return [text]
    cuts, border = [0], re.compile(r"\n(?=\S)")
    while found := border.search(text, cuts[-1] + _PIECE):
        cuts.append(found.start())
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def write_config(folder: Path, config: dict[str, Any]) -> None:
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    write_file(folder / "tokenizer_config.json", text.encode())


def write_file(path: Path, contents: bytes) -> None:
    """Whole or, if interrupted, not at all."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(beside, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _mark(value: Any, spelled: re.Pattern) -> Any:
    if isinstance(value, str):
        return spelled.sub(lambda found: found[0][0] + _MARK + found[0][1:], value)
    if isinstance(value, Mapping):
        return {_mark(k, spelled): _mark(v, spelled) for k, v in value.items()}
    return [_mark(v, spelled) for v in value] if isinstance(value, (list, tuple)) else value


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"[tokenizer] text must be a str, but got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        wrong = f"{e.object[e.start]!r} at character {e.start}"
        raise ValueError(f"[tokenizer] text must be valid Unicode, but got {wrong}") from None


def without_control(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer for text in which control tokens are spelled out but not meant.

    The library does not look for them then, but a model that has them among its pieces may still come upon them.
    """
    control = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    if not control or not isinstance(backend.model, (models.Unigram, models.WordLevel, models.BPE)):
        return backend
    if isinstance(backend.model, models.BPE) and backend.pre_tokenizer is not None:
        return backend  # words end at punctuation
    contents = json.loads(backend.to_str())
    model = contents["model"]
    if isinstance(backend.model, models.BPE):
        merges = [
            m for m in model["merges"] if (m.replace(" ", "") if isinstance(m, str) else "".join(m)) not in control
        ]
        if len(merges) == len(model["merges"]):
            return backend
        model["merges"] = merges
    else:
        # No word or piece has a space in it.
        hidden = {token: f" {token} " for token in control}
        if isinstance(model["vocab"], dict):
            model["vocab"] = {hidden.get(token, token): i for token, i in model["vocab"].items()}
            model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
        else:
            model["vocab"] = [[hidden.get(token, token), score] for token, score in model["vocab"]]
        contents["added_tokens"] = [t for t in contents["added_tokens"] if not t["special"]]
    plain = tokenizers.Tokenizer.from_str(json.dumps(contents))
    plain.encode_special_tokens = True
    return plain


def _from_json(contents: str, arguments: dict[str, Any]) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(contents), **arguments)
