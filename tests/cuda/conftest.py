"""These tests run on a CUDA device, or in a build with PYLLM_EMULATE_CUDA=ON, whose CUDA kernels run on the CPU."""

import pytest
import torch

from pyllm import _C

EMULATED = _C.info()["cuda_emulated"]


@pytest.fixture
def device():
    """Where to put tensors so that operations on them run our CUDA kernels."""
    if EMULATED:
        _C._emulate_cuda(True)
        try:
            yield torch.device("cpu")
            _C.synchronize(0)
        finally:
            _C._emulate_cuda(False)
    elif _C.info()["cuda_devices"] and torch.cuda.is_available():
        yield torch.device("cuda")
        _C.synchronize(0)
    else:
        pytest.skip("needs a CUDA device, or a build that emulates one")


@pytest.fixture
def wait(device):
    """Waits until kernels have found what they will, and raises nothing."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


@pytest.fixture
def on_cpu(device):
    """Calls a function with the CPU's kernels."""

    def call(f):
        if not EMULATED:
            return f()
        _C._emulate_cuda(False)
        try:
            return f()
        finally:
            _C._emulate_cuda(True)

    return call


def pytest_collection_modifyitems(items):
    for item in items:
        if "device" in getattr(item, "fixturenames", ()) and "tests/cuda" in item.path.as_posix():
            item.add_marker(pytest.mark.cuda)
