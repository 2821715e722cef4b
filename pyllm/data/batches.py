"""Batches of next-token prediction: inputs (B, T), and as targets the token after each.

A corpus of N tokens is N - 1 targets, cut into windows of T. A batch gathers windows from the one tensor of ids, and
which ones is a pure function of (seed, epoch, step): an interrupted run goes on by asking for the next step.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class SequenceLoader:
    """The batches of a corpus: (inputs, targets), int64 (B, T) each, targets one token later than inputs.

    In order (shuffle=False), the corpus is B streams side by side, one a row, and each batch continues the one before:
    row b of batch s + 1 follows row b of batch s, so that a hidden state can be carried along (`contiguous` is True).
    With shuffle=True, the windows of an epoch begin at a random offset, do not overlap, and come in random order.

    Iterating gives the batches of epoch `epoch`, which counts up when the last of them is taken; set it to go
    elsewhere. `batch(epoch, step)` gives any one batch, the same every time.

    Args:
        ids: (N,), a tensor, array or list of integers. An int32 or int64 one is used in place: leave it unchanged.
        batch_size, sequence_length: B and T.
        shuffle: random order, another one each epoch; else in order, the same each epoch.
        seed: of the random order, at least 0.
        device: where the batches go; the ids stay where they are.
        drop_last: if True, every batch is (B, T), and the tokens that do not fill one are left out. If False, which
            needs shuffle=False, every token but the first is a target exactly once: the windows that fill no batch are
            a batch of fewer rows, and the tokens that fill no window a batch of one shorter row. So the windows are the
            same for any B. A smaller batch of r rows continues the last r rows of the batch before it.

    Raises:
        ValueError: too few tokens for one batch (with drop_last=False: for one target), or a number out of range.
        TypeError: ids that are no integers.
    """

    def __init__(self, ids: Sequence[int] | Tensor | np.ndarray, batch_size: int, sequence_length: int, *,
                 shuffle: bool = False, seed: int = 0, device: torch.device | str | None = None,
                 drop_last: bool = True):  # fmt: skip
        _check_number("SequenceLoader", "batch_size", batch_size, 1)
        _check_number("SequenceLoader", "sequence_length", sequence_length, 1)
        _check_number("SequenceLoader", "seed", seed, 0)
        if shuffle and not drop_last:
            raise ValueError("[SequenceLoader] drop_last=False scores every token in order: it needs shuffle=False")
        self.ids = _as_ids(ids, "SequenceLoader")
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.device = None if device is None else torch.device(device)
        self.epoch = 0
        targets = len(self.ids) - 1
        needed = batch_size * sequence_length + 1 if drop_last else 2
        if targets + 1 < needed:
            what = f"one batch of {batch_size} x {sequence_length}" if drop_last else "one target"
            raise ValueError(f"[SequenceLoader] {what} needs {needed} tokens, but the corpus has {targets + 1}")
        self._windows, self._rest = divmod(targets, sequence_length)
        if shuffle:
            # Any offset below T leaves room for this many batches; a corpus of hardly one batch has fewer offsets.
            self._full = max(1, (targets - (sequence_length - 1)) // (batch_size * sequence_length))
            self._offsets = min(sequence_length, targets - self._full * batch_size * sequence_length + 1)
        else:
            self._full = self._windows // batch_size
        self._order: tuple[int, int, np.ndarray] | None = None

    @property
    def contiguous(self) -> bool:
        """Whether each batch continues the rows of the one before it."""
        return not self.shuffle

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        if self.drop_last:
            return self._full
        return self._full + (self._windows % self.batch_size > 0) + (self._rest > 0)

    @property
    def tokens(self) -> int:
        """The number of targets in an epoch."""
        return self._full * self.batch_size * self.sequence_length if self.drop_last else len(self.ids) - 1

    def signature(self) -> dict:
        """What makes the batches what they are, as plain values: two loaders of one signature give the same batches."""
        return {"tokens": len(self.ids), "crc32": zlib.crc32(self.ids.to("cpu", torch.int64).numpy().data),
                "batch_size": self.batch_size, "sequence_length": self.sequence_length, "shuffle": self.shuffle,
                "seed": self.seed, "drop_last": self.drop_last}  # fmt: skip

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Batch `step`, in [0, len(self)), of an epoch: a copy, the caller's to change.

        Raises:
            IndexError: there is no such step or epoch.
        """
        if epoch < 0:
            raise IndexError(f"[SequenceLoader] epoch must be at least 0, but got {epoch}")
        if not 0 <= step < len(self):
            raise IndexError(f"[SequenceLoader] step must be in [0, {len(self)}), but got {step}")
        starts, width = self._starts(epoch, step)
        windows = self.ids.unfold(0, width + 1, 1)[torch.from_numpy(starts).to(self.ids.device)]
        windows = windows.to(self.device, torch.int64)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.epoch
        for step in range(len(self)):
            if step == len(self) - 1:
                self.epoch = epoch + 1
            yield self.batch(epoch, step)

    def _starts(self, epoch: int, step: int) -> tuple[np.ndarray, int]:
        """Where the rows of a batch begin in the ids, and how wide it is."""
        rows, width = self.batch_size, self.sequence_length
        if self.shuffle:
            offset, order = self._shuffled(epoch)
            return offset + order[step * rows : (step + 1) * rows] * width, width
        # Row b is a stream of `full` windows, one longer in the last `longer` rows, which therefore go on for a batch.
        longer = 0 if self.drop_last else self._windows % rows
        row = np.arange(rows)
        first = row * self._full + np.maximum(0, row - (rows - longer))
        if step < self._full:
            return (first + step) * width, width
        if step == self._full and longer:
            return (first[rows - longer :] + step) * width, width
        return np.array([self._windows * width]), self._rest

    def _shuffled(self, epoch: int) -> tuple[int, np.ndarray]:
        if self._order is None or self._order[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            offset = int(random.integers(self._offsets))
            self._order = epoch, offset, random.permutation((len(self.ids) - 1 - offset) // self.sequence_length)
        return self._order[1:]


class SequenceDataset(Dataset):
    """The windows of a corpus one by one, for torch's own DataLoader: item k is (inputs, targets), int64 (T,) each.

    Window k begins at token k * T, windows do not overlap, and the tokens that do not fill the last one are left out.
    Arguments and errors are as in `SequenceLoader`.
    """

    def __init__(self, ids: Sequence[int] | Tensor | np.ndarray, sequence_length: int):
        _check_number("SequenceDataset", "sequence_length", sequence_length, 1)
        self.ids = _as_ids(ids, "SequenceDataset")
        self.sequence_length = sequence_length
        if len(self.ids) <= sequence_length:
            needed = sequence_length + 1
            raise ValueError(f"[SequenceDataset] one window needs {needed} tokens, but the corpus has {len(self.ids)}")

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"[SequenceDataset] index must be in [0, {len(self)}), but got {index}")
        start = index % len(self) * self.sequence_length
        window = self.ids[start : start + self.sequence_length + 1].long()
        return window[:-1].clone(), window[1:].clone()


def _check_number(owner: str, name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"[{owner}] {name} must be an integer of at least {least}, but got {value!r}")


def _as_ids(ids: Sequence[int] | Tensor | np.ndarray, name: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor does anything here write to it
        tensor = torch.as_tensor(ids)
    if tensor.dim() != 1:
        raise ValueError(f"[{name}] ids must have 1 dimension, but got shape {tuple(tensor.shape)}")
    if not len(tensor):
        return tensor.long()
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"[{name}] ids must be integers, but got {tensor.dtype}")
    if tensor.dtype in (torch.int32, torch.int64):
        return tensor
    return tensor.to(torch.int32 if tensor.dtype.itemsize < 4 else torch.int64)
