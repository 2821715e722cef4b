from __future__ import annotations

import torch
from torch import Tensor

from pyllm import _C, ops


def info() -> dict:
    """What runs here: version, instruction sets, threads, torch, CUDA, and the backends of each operation."""
    core = _C.info()
    on_cuda = ops.CUDA if core["cuda_built"] and not ops.REFERENCE else frozenset()
    backend = "reference" if ops.REFERENCE else "cpu"
    return {
        "version": core["version"],
        "instruction_sets": core["isas"],
        "chosen": core["isa"],
        "threads": core["threads"],
        "thread_backend": core["thread_backend"],
        "torch": torch.__version__,
        "cuda_built": core["cuda_built"],
        "cuda_devices": core["cuda_devices"],
        "ops": {name: [backend, "cuda"] if name in on_cuda else [backend] for name in ops.__all__ if name[0].islower()},
    }


def synchronize(device: int = 0) -> None:
    """Waits for all work on a CUDA device, and raises what our kernels have found there since the last call, such as an
    id outside its table: the host cannot check what lies in the device's memory without waiting for it.

    Raises:
        IndexError, ValueError: what was found; so does the next operation on that device.
        RuntimeError: the device reports an error. NotImplementedError: a build without CUDA.
    """
    _C.synchronize(device)


def raise_found(t: Tensor) -> None:
    """`synchronize` for a tensor's device, if that is a CUDA device: what was found is of no one else's work then."""
    if t.is_cuda or _C.emulating_cuda():
        _C.synchronize(t.device.index or 0)


def num_threads() -> int:
    """How many threads the compiled operations use."""
    return _C.num_threads()


def set_num_threads(n: int) -> None:
    """Sets how many threads the compiled operations use, 1 to 4096; torch.set_num_threads sets torch's own."""
    _C.set_num_threads(n)
