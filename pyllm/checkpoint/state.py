"""The state of a training run as trees of plain values and named tensors."""

from __future__ import annotations

import random
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyllm.checkpoint.files import CheckpointError

_REFERENCE = "$tensor"


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict:
    """An optimizer's whole state, for `save_checkpoint`'s training: by the names of parameters, not by their position.

    Returns {"type", "groups": [{"parameters": {name: shape}, the group's settings}], "state": {name: its tensors and
    scalars}}. The tensors are the optimizer's own, not copies.

    Raises:
        ValueError: a parameter that is not the model's.
    """
    names = _names(model)
    return {
        "type": type(optimizer).__name__,
        "groups": [
            {
                "parameters": _shapes(group, names),
                **{k: v for k, v in group.items() if k not in ("params", "param_names")},
            }
            for group in optimizer.param_groups
        ],
        "state": {names[parameter]: dict(state) for parameter, state in optimizer.state.items()},
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict) -> None:
    """Puts back what `optimizer_tensors` gave, bit for bit, to an optimizer made as the saved one was.

    Raises:
        ValueError: another kind of optimizer, or other parameters; nothing is changed then.
    """
    names = _names(model)
    _check_same("optimizer", saved["type"], type(optimizer).__name__)
    _check_same("number of groups of parameters", len(saved["groups"]), len(optimizer.param_groups))
    known = set()
    for i, (theirs, group) in enumerate(zip(saved["groups"], optimizer.param_groups, strict=True)):
        expected, got = list(theirs["parameters"].items()), list(_shapes(group, names).items())
        for a, b in zip_longest(expected, got):
            _check_same(f"next parameter of group {i}", a, b)
        known |= theirs["parameters"].keys()
    for name in saved["state"]:
        if name not in known:
            raise ValueError(f"[restore_optimizer] saved has a state for {name!r}, which is in no group of parameters")
    optimizer.state.clear()
    for theirs, group in zip(saved["groups"], optimizer.param_groups, strict=True):
        for key, value in theirs.items():
            if key != "parameters":
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else _copied(value, None)
        # torch's load_state_dict would round each tensor to its parameter's dtype.
        on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            if (state := saved["state"].get(names[parameter])) is not None:
                optimizer.state[parameter] = {
                    key: _copied(value, parameter.device if key != "step" or on_device else None)
                    for key, value in state.items()
                }


def random_state() -> dict:
    """Where the global random generators of Python, NumPy and torch (on each CUDA device in use) are."""
    version, internal, gauss = random.getstate()
    name, key, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, torch.tensor(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(key, np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_random_state(saved: dict) -> None:
    """Puts the global random generators back to where `random_state` found them."""
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, key, *rest = saved["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    if saved["cuda"]:
        torch.cuda.set_rng_state_all(saved["cuda"])


def pack(tree: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """A tree with each tensor moved to `tensors` under its path; what is left is JSON. Tuples become lists.

    Raises:
        TypeError, ValueError: a value that neither JSON nor safetensors can hold exactly.
    """
    if isinstance(tree, Tensor):
        if where in tensors:
            raise ValueError(f"{where} must be one tensor, but two have this path")
        tensors[where] = tree
        return {_REFERENCE: where}
    if isinstance(tree, dict):
        for key in tree:
            if not isinstance(key, str):
                raise TypeError(f"{where} must have keys that are strings, but got {key!r}")
            if key == _REFERENCE:
                raise ValueError(f"{where} must not use the key {_REFERENCE}")
        return {key: pack(value, f"{where}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [pack(value, f"{where}/{i}", tensors) for i, value in enumerate(tree)]
    if not isinstance(tree, str | int | float | None):
        raise TypeError(f"{where} must be a tensor or what JSON can hold, but got {type(tree).__name__}")
    return tree


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that `pack` was given.

    Raises:
        CheckpointError: a tensor that is not there.
    """
    if isinstance(tree, dict):
        if tree.keys() == {_REFERENCE}:
            name = tree[_REFERENCE]
            if not isinstance(name, str) or name not in tensors:
                raise CheckpointError(f"optimizer.safetensors must hold {name!r}, but does not")
            return tensors[name]
        return {key: unpack(value, tensors) for key, value in tree.items()}
    return [unpack(value, tensors) for value in tree] if isinstance(tree, list) else tree


def _check_same(what: str, saved: Any, got: Any) -> None:
    if saved != got:
        raise ValueError(f"[restore_optimizer] the {what} must be the saved {saved!r}, but got {got!r}")


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _shapes(group: dict, names: dict[Tensor, str]) -> dict[str, list[int]]:
    for parameter in group["params"]:
        if parameter not in names:
            shape = tuple(parameter.shape)
            raise ValueError(f"[optimizer] its parameters must be the model's, but one of shape {shape} is not")
    return {names[parameter]: list(parameter.shape) for parameter in group["params"]}


def _copied(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device or value.device, copy=True)
    if isinstance(value, dict):
        return {key: _copied(v, device) for key, v in value.items()}
    return [_copied(v, device) for v in value] if isinstance(value, list | tuple) else value
