from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyllm.checkpoint import (
    check_savable,
    load_checkpoint,
    optimizer_tensors,
    random_state,
    restore_optimizer,
    restore_random_state,
    save_checkpoint,
)
from pyllm.models import Model
from pyllm.nn import RecurrentState
from pyllm.runtime import raise_found
from pyllm.text import Tokenizer
from pyllm.training.metrics import (
    History,
    Inputs,
    device_of,
    logits_of,
    moved,
    next_state,
    state_to_carry,
    test,
)
from pyllm.training.optimizer import AdamW, clip_scale, gradient_norm
from pyllm.training.progress import Progress


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal, between two steps; `history` is its course so far."""

    def __init__(self, message: str, history: History):
        super().__init__(message)
        self.history = history


def train(model: torch.nn.Module, loader: Iterable[tuple[Inputs, Tensor]], optimizer: torch.optim.Optimizer,
          criterion: Callable | None = None, epochs: int = 1, *, steps: int | None = None,
          schedule: Callable[[int], float] | None = None, clip_norm: float | None = 1.0,
          carry_state: bool | None = None, validation: Iterable | None = None, validate_every: int | None = None,
          folder: str | os.PathLike | None = None, tokenizer: Tokenizer | None = None, save_every: int | None = None,
          resume: bool = False, settings: dict | None = None, progress: bool = True) -> History:  # fmt: skip
    """Trains a model on (inputs, targets) batches of token ids, each (B, T), which are moved to where the model is.

    Args:
        model: a `pyllm.models.Model`, or any module that maps ids (B, T) to logits (B, T, vocabulary). A model with a
            loss of its own takes targets as that does, and inputs may be a dict of its arguments, such as
            {"ids": ids, "lengths": lengths}.
        loader: gives the batches of an epoch each time it is iterated; to be resumed it must be a `SequenceLoader`.
        criterion: called with logits (B * T, vocabulary) and targets (B * T,). Default: the model's own loss, which for
            models of this package is a cross-entropy that never holds all logits.
        epochs, steps: how long; `steps` counts from the start of the training, over epochs.
        schedule: the factor on the optimiser's learning rate at a step, such as `warmup_cosine(steps)`.
        clip_norm: the norm that the gradients are clipped to, or None. `pyllm.training.AdamW` does so as it reads
            them.
        carry_state: whether a recurrent model's state goes on from batch to batch (cut for the gradient) within an
            epoch. Default: where the loader's batches continue each other. Otherwise each batch starts from zeros.
        validation: a loader for `test`, run every `validate_every` steps and at the end.
        folder: where the checkpoint goes, every `save_every` steps, at the end, and when a signal interrupts.
        resume: go on from the folder's checkpoint; what follows is bit for bit what would have followed.
        settings: kept in the checkpoint, for the caller's own use.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the step under way was finished and the checkpoint saved. A second one stops at
            once.
        FloatingPointError: the loss, or the norm that gradients are clipped by, is no longer finite; nothing of that
            step is kept.
        ValueError, TypeError, FileExistsError: the checkpoint's batches or dtypes are not these, the folder cannot take
            a checkpoint, or an argument does not fit another; before the first step.
    """
    where = None if folder is None else Path(folder)
    if resume and where is None:
        raise ValueError("resume=True needs the folder to resume from")
    if where is not None and not isinstance(model, Model):
        raise TypeError(f"only a pyllm.models.Model can be saved, but got {type(model).__name__}: leave out folder")
    per_epoch = len(loader) if isinstance(loader, Sized) else None
    if per_epoch == 0:
        raise ValueError("the loader must have a batch, but has none")
    if per_epoch is not None:
        total = epochs * per_epoch if steps is None else steps
    elif steps is None:
        raise ValueError("a loader without len() needs steps=")
    else:
        total = steps
    make_state = state_to_carry(model, loader, carry_state)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])

    run = _Run(model, optimizer, loader, make_state, tokenizer, settings)
    if resume and where is not None:
        run.restore(where)
    if where is not None:
        check_savable(where, **run.contents())
    model.train()
    with _stop_signals() as stopped, Progress(total, len(run.history.losses), enabled=progress) as bar:
        for inputs, targets in run.batches(total):
            began = time.perf_counter()
            step = len(run.history.losses)
            if schedule is not None:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * schedule(step)
            optimizer.zero_grad(set_to_none=True)
            loss = _loss(model, inputs, targets, criterion, run.state)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise_found(loss)  # a wrong id says more
                raise FloatingPointError(f"the loss is {value} at step {step + 1}: try a smaller learning rate")
            loss.backward()
            _update(model, optimizer, clip_norm, step + 1)
            if run.state is not None:
                run.state.detach_()
            run.history.losses.append(value)
            run.history.tokens += targets.numel()
            run.history.seconds += time.perf_counter() - began
            step += 1
            bar.step(value, targets.numel())
            if validation is not None and (step == total or (validate_every and step % validate_every == 0)):
                run.history.validation.append((step, test(model, validation, criterion, carry_state=carry_state)))
            if where is not None and (step == total or stopped or (save_every and step % save_every == 0)):
                run.save(where)
            if stopped and step < total:
                saved = "" if where is None else f", saved to {where}"
                raise Interrupted(f"stopped after step {step} of {total}{saved}", run.history)
    return run.history


def _update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None, step: int) -> None:
    if clip_norm is None:
        optimizer.step()
        return
    norm = gradient_norm(model.parameters())
    if not math.isfinite(norm):
        raise FloatingPointError(f"the norm of the gradients is {norm} at step {step}: try a smaller learning rate")
    if isinstance(optimizer, AdamW):
        optimizer.step(scale=clip_scale(norm, clip_norm))
    else:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, norm)
        optimizer.step()


def _loss(model, inputs: Inputs, targets: Tensor, criterion: Callable | None, state) -> Tensor:
    if criterion is None and isinstance(model, Model):
        if isinstance(inputs, Mapping):
            return model.loss(**inputs, targets=targets)
        return model.loss(inputs, targets, state)
    logits = logits_of(model, inputs, state)
    if logits.dim() < 2 or logits.shape[:-1] != targets.shape:
        raise ValueError("the model must return logits (B, T, vocabulary) for targets (B, T) = "
                         f"{tuple(targets.shape)}, but got {tuple(logits.shape)}")  # fmt: skip
    return (criterion or torch.nn.functional.cross_entropy)(logits.flatten(0, -2), targets.flatten())


class _Run:
    """A training under way: what a checkpoint must hold beside the weights, and how to put it back."""

    def __init__(self, model, optimizer, loader, make_state, tokenizer, settings: dict | None):
        self.model, self.optimizer, self.loader = model, optimizer, loader
        self.make_state, self.tokenizer, self.settings = make_state, tokenizer, settings
        self.history = History()
        self.device = device_of(model)
        self.state: RecurrentState | None = None

    def batches(self, total: int):
        """The batches from the step that the history has reached, over epochs, up to `total` steps."""
        while (done := len(self.history.losses)) < total:
            if hasattr(self.loader, "batch"):
                epoch, first = divmod(done, len(self.loader))
                source = (self.loader.batch(epoch, s) for s in range(first, len(self.loader)))
            else:
                first, source = 0, iter(self.loader)
            before = done
            for n, (inputs, targets) in enumerate(islice(source, total - done), first):
                if self.make_state:
                    self.state = next_state(self.make_state, self.state if n else None, len(inputs))
                yield moved(inputs, self.device), targets.to(self.device)
            if len(self.history.losses) == before:
                raise ValueError("the loader gave no batch")

    def _signature(self) -> dict | None:
        return self.loader.signature() if hasattr(self.loader, "signature") else None

    def contents(self) -> dict[str, Any]:
        """What a checkpoint is to hold, but for the tokenizer."""
        training = {"history": self.history.to_json(), "batches": self._signature(), "settings": self.settings,
                    "optimizer": optimizer_tensors(self.optimizer, self.model), "random": random_state(),
                    "state": None if self.state is None else self.state.tensors()}  # fmt: skip
        return {"model_type": self.model.model_type, "config": self.model.config, "weights": self.model.state_dict(),
                "training": training}  # fmt: skip

    def save(self, folder: Path) -> None:
        save_checkpoint(folder, tokenizer=self.tokenizer, **self.contents())

    def restore(self, folder: Path) -> None:
        if not hasattr(self.loader, "batch"):
            raise ValueError(
                "only a training on a SequenceLoader can be resumed: its batches are known from the step alone"
            )
        saved = load_checkpoint(folder)
        if saved.training is None:
            raise ValueError(f"{folder} holds a model but no training to resume")
        if saved.config != self.model.config or saved.model_type != self.model.model_type:
            raise ValueError(f"{folder} holds a {saved.model_type} {saved.config}, but got a "
                             f"{self.model.model_type} {self.model.config}")  # fmt: skip
        if saved.training["batches"] != self._signature():
            raise ValueError(f"the checkpoint's batches were {saved.training['batches']}, but got {self._signature()}")
        for name, own in self.model.state_dict().items():
            if name in saved.weights and saved.weights[name].dtype != own.dtype:
                raise ValueError(f"{folder} holds {name} in {saved.weights[name].dtype}, but got {own.dtype}")
        self.model.load_state_dict(saved.weights)
        restore_optimizer(self.optimizer, self.model, saved.training["optimizer"])
        restore_random_state(saved.training["random"])
        self.history = History.from_json(saved.training["history"])
        if saved.training["state"] is not None and self.make_state:
            self.state = self.make_state(len(saved.training["state"]["lengths"]))
            self.state.load_tensors({k: v.to(self.device) for k, v in saved.training["state"].items()})


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is empty until the first SIGINT or SIGTERM; the second one acts as it did before."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number, frame):
        received.append(number)
        signal.signal(number, before[number])

    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in found.items() if handler is not None}  # None: not Python's
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
