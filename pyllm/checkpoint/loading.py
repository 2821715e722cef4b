"""Models from the checkpoints that people have: finds out whose it is, and checks all of it before it takes memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyllm.checkpoint.files import CheckpointError, check_plain, read_json, short
from pyllm.checkpoint.folder import is_ours, load_checkpoint, save_checkpoint
from pyllm.checkpoint.gguf import open_gguf
from pyllm.checkpoint.hub import download
from pyllm.checkpoint.llama2c import open_llama2c
from pyllm.checkpoint.pickled import PICKLED, PICKLED_INDEX, open_pickled
from pyllm.checkpoint.reader import FileReader, MemoryReader
from pyllm.checkpoint.safetensors import INDEX, WEIGHTS, open_shards
from pyllm.families import FAMILIES, Family, PackedReader, WeightReader, WeightsError, check_config, load_weights
from pyllm.families.settings import for_long_texts, generation_settings, unheeded_settings
from pyllm.models import MODELS, Model
from pyllm.nn import Embedding, Quantizable
from pyllm.nn.quantized import QUANTIZED
from pyllm.ops import PackedQuantizedWeight
from pyllm.text import Tokenizer

_SETTING = (Tensor.normal_, Tensor.uniform_)
Progress = Callable[[int, int], None]


class _How(NamedTuple):
    """The arguments of `load`."""

    dtype: torch.dtype | None
    long: bool
    mapped: bool
    tokenizer: bool
    progress: Progress | None


_QUANTIZED = tuple(f".{part}" for part in QUANTIZED)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers",
           "decoder_layers")  # fmt: skip


def load(path: str | os.PathLike, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None,
         long: bool = False, mapped: bool = True, tokenizer: bool = True,
         progress: Progress | None = None) -> tuple[Model, Tokenizer | None]:  # fmt: skip
    """The model and the tokenizer of a checkpoint; the model is in evaluation mode.

    Everything is checked before memory is taken for the weights, and no code from a checkpoint is ever run.

    Weights that stay as the checkpoint has them, in dtype and order, are not copied: they lie in its files' pages,
    which the system reads when they are used and shares among processes. Those files may be replaced, but must not be
    written to while the model lives. Training changes copies of the pages. Those of GPT-2 in float32, which it has
    transposed, lie there too: such a weight is not contiguous until it is trained or converted.

    Args:
        path: a checkpoint of our own; a Hugging Face folder (config.json, with safetensors in one file or in shards, or
            pickled weights); a GGUF file; a llama2.c .bin file of version 0 or 1, with its vocabulary beside it as
            tokenizer.bin or, say, tok512.bin; or, where there is no such file, "owner/name" on the Hugging Face hub.
        dtype: the weights' own, if None; of a GGUF file, that of most values, where packed ones count as float32.
            With None, the packed weights of a GGUF file's linear layers and embeddings stay packed, in 8 or 4 bits with
            the same values (Q2_K and Q3_K do not), and run as those that `model.quantize` makes; a dtype widens them.
            Quantised weights of our own checkpoints stay so, and dtype is that of the others.
        device: the CPU, if None.
        long: of a Hugging Face folder whose config has longrope (Phi-3 with 128k): positions turn by the factors for
            long texts, which have all of its context then. `transformers` takes them where a text is longer than those
            of the first training, and the short ones up to there, which are the only ones here if False: each text has
            the same factors from its first token to its last.
        mapped: False copies all weights into memory of their own: what then happens to the files does not matter.
        tokenizer: False leaves it unread, and None comes in its place.
        progress: called with the number of the weights' elements read so far, and of all.

    Raises:
        FileNotFoundError: there is no such file or folder, and it cannot be had from the hub.
        CheckpointError: it is not a checkpoint, or one whose parts do not fit together.
        ImportError: a package is needed to read it, and is not there.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"[load] dtype must be a floating-point torch.dtype, but got {dtype!r}")
    where = Path(path)
    if not where.exists():
        where = download(path)
    how = _How(dtype, long, mapped, tokenizer, progress)
    if where.is_dir() and not is_ours(where):
        model, text = _folder(where, how)
    elif long:
        raise CheckpointError(f"{where}: long must be False: only Hugging Face folders have factors for long texts")
    elif where.is_dir():
        model, text = _ours(where, how)
    else:
        model, text = _file(where, how)
    return model.to(device).eval() if device is not None else model.eval(), text


def _ours(path: Path, how: _How) -> tuple[Model, Tokenizer | None]:
    saved = load_checkpoint(path, training=False, tokenizer=how.tokenizer, mapped=how.mapped)
    if saved.model_type not in MODELS:
        raise CheckpointError(f"{path}: model_type must be one of {', '.join(MODELS)}, but got {saved.model_type!r}")
    model = _empty(path, saved.model_type, lambda: MODELS[saved.model_type](**saved.config))
    own = model.state_dict()
    parts = {k: k.rpartition(".")[0] for k in saved.weights if k.endswith(_QUANTIZED) and k not in own}
    quantized = dict.fromkeys(parts.values())
    expected = {k: tuple(v.shape) for k, v in own.items() if k not in quantized}
    found = {k: tuple(v.shape) for k, v in saved.weights.items() if k not in parts}
    if expected != found:
        wrong = [f"{k} must be {expected.get(k, 'absent')}, but got {found.get(k, 'nothing')}"
                 for k in sorted(expected.keys() | found.keys()) if expected.get(k) != found.get(k)]  # fmt: skip
        raise CheckpointError(f"{path}: {'; '.join(wrong[:5])}" + (f"; and {len(wrong) - 5} more" if wrong[5:] else ""))
    _quantize(path, model, saved.weights, quantized)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    model.load_state_dict(saved.weights, assign=True)
    for first, *tied in names.values():  # they came back as parameters of their own
        for name in tied:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, model.get_parameter(first))
    if quantized:
        for module in model.modules():
            if isinstance(module, Embedding) and module.quantized:
                module.to(model.dtype)
    return model if how.dtype is None else model.to(how.dtype), saved.tokenizer


def _quantize(path: Path, model: Model, weights: dict[str, Tensor], names: Iterable[str]) -> None:
    """Takes the quantised weights of layers out of `weights` and puts them into the layers."""
    shared: dict[tuple | None, PackedQuantizedWeight] = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        panels, layout = [weights.pop(f"{name}.{k}", None) for k in QUANTIZED]
        same = None
        if panels is not None and layout is not None and panels.numel():
            same = panels.data_ptr(), layout.dtype, tuple(layout.flatten().tolist())
        try:
            layer = cast(Quantizable, model.get_submodule(owner))
            if same in shared:
                layer.quantize_(shared[same], attribute)
            else:
                layer.load_quantized_(attribute, panels, layout)
                if same is not None:
                    shared[same] = layer.quantized[attribute]
        except (AttributeError, TypeError, ValueError) as e:
            raise CheckpointError(f"{path}: {name}: {e}") from None


def _folder(path: Path, how: _How) -> tuple[Model, Tokenizer | None]:
    config = read_json(path / "config.json")
    try:
        check_plain(config, "config")
    except ValueError as e:
        raise CheckpointError(f"{path / 'config.json'}: {e}") from None
    family = _check_family(path, config)
    generating = config
    if (path / "generation_config.json").exists():
        generating = read_json(path / "generation_config.json")
        if family.model.answers:
            config |= generation_settings(generating)
    if any((path / name).exists() for name in (WEIGHTS, INDEX)):
        opened: FileReader | MemoryReader = open_shards(path, mapped=how.mapped)
    elif any((path / name).exists() for name in (PICKLED, PICKLED_INDEX)):
        opened = open_pickled(path)
    else:
        raise CheckpointError(f"{path} must hold {WEIGHTS}, {INDEX} or {PICKLED}, but has none of them")
    with opened as reader:
        model = _of_config(path, config, reader, how)
    model.unheeded = unheeded_settings(generating, model.config.get("suppressed_ids", ()))
    return model, _tokenizer(path, lambda: Tokenizer.load(path)) if how.tokenizer else None


def _file(path: Path, how: _How) -> tuple[Model, Tokenizer | None]:
    with open(path, "rb") as file:
        begin = file.read(4)
    if begin == b"GGUF" or path.suffix == ".gguf":
        with open_gguf(path, mapped=how.mapped) as weights:
            table, settings = weights.architecture, weights.config
            packed = weights if how.dtype is None else None
            how = how._replace(dtype=how.dtype or weights.dtype)
            model = _filled(path, table, lambda: settings, weights, how, packed)
            model.family = table.family_of(model.config)
            if "tokenizer.ggml.model" not in weights.metadata or not how.tokenizer:
                return model, None
            return model, _tokenizer(path, lambda: Tokenizer.from_gguf_metadata(weights.metadata))
    if begin[:2] in (b"PK", b"\x80\x02") or path.suffix != ".bin":
        raise CheckpointError(f"{path} must be a GGUF or a llama2.c file, but begins with {begin!r}; weights of "
                              "other formats are loaded by the folder that says what model they are of")  # fmt: skip
    config, reader = open_llama2c(path, mapped=how.mapped)
    with reader:
        model = _of_config(path, config, reader, how)
    if not how.tokenizer:
        return model, None
    beside = (path.with_name(name) for name in ("tokenizer.bin", f"tok{model.vocab_size}.bin"))
    found = next((file for file in beside if file.exists()), None)
    return model, None if found is None else _tokenizer(path, lambda: Tokenizer.load(found))


def _of_config(path: Path, config: dict[str, Any], reader: WeightReader, how: _How) -> Model:
    """The model of a Hugging Face config."""
    family, names = _check_family(path, config), len(reader.entries())
    if family.complete is not None:
        config = family.complete(config, reader.entries())
    for key in _LAYERS:
        layers = config.get(key)
        if isinstance(layers, int | float) and not 0 <= layers <= names:
            raise CheckpointError(f"{path}: {key} must be in [0, {names}], the number of weights, but is {layers}")

    def settings() -> dict[str, Any]:
        found = family.config(config)
        return for_long_texts(found) if how.long else found

    model = _filled(path, family, settings, reader, how)
    model.family = family.model_type
    return model


def _filled(path: Path, family: Family, settings: Callable[[], dict], reader: WeightReader, how: _How,
            packed: PackedReader | None = None) -> Model:  # fmt: skip
    model = _empty(path, family.model_type, lambda: family.model(**settings()))
    try:
        load_weights(model, family, reader, dtype=how.dtype, packed=packed, progress=how.progress)
    except WeightsError as e:
        raise CheckpointError(f"{path}: " + "; ".join(str(e).split("\n  ")).replace(":;", ":")) from None
    return model


def _check_family(path: Path, config: dict[str, Any]) -> Family:
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        asks = ", and code of the checkpoint's own (auto_map) is never run" if "auto_map" in config else ""
        raise CheckpointError(f"{path}: model_type must be one of {', '.join(FAMILIES)}, but got {short(kind)}{asks}")
    try:
        check_config(config, family)
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: {e}") from None
    return family


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Models that are made inside have no memory for their weights, and do not set them."""
    with torch.device("meta"), _Unset():
        yield


class _Unset(TorchFunctionMode):
    """Leaves out what sets weights: on the meta device it does nothing, but loads torch's whole compiler."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init" or func in _SETTING:
            return args[0] if args else next(iter((kwargs or {}).values()))
        return func(*args, **(kwargs or {}))


def _empty(path: Path, kind: str, make: Callable[[], Model]) -> Model:
    """A model without memory for its weights."""
    try:
        with without_memory():
            return make()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())[:500]
        raise CheckpointError(f"{path}: its config does not make a {kind} model: {reason}") from e


def _tokenizer(path: Path, make: Callable[[], Tokenizer]) -> Tokenizer | None:
    try:
        return make()
    except IsADirectoryError:  # none of a tokenizer's files
        return None
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}") from e


def save(model: Model, path: str | os.PathLike, tokenizer: Tokenizer | None = None) -> None:
    """Writes a checkpoint folder that `load` reads; an older one is replaced only once it is complete."""
    save_checkpoint(
        path, model_type=model.model_type, config=model.config, weights=model.state_dict(), tokenizer=tokenizer
    )
