"""Which device an operation runs on, and what is said where it cannot."""

import ctypes
import sys

import pytest
import torch
from test_bad_input import GOOD

import pyllm
from pyllm import _C, ops

EMULATED = _C.info()["cuda_emulated"]


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class ExchangeApi(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p), ("from_py", ctypes.c_void_p), ("to_py", ctypes.c_void_p),
        ("tensor_from_py", ctypes.c_void_p), ("stream", ctypes.c_void_p),
    ]  # fmt: skip


FROM_PY = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))
STREAM = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
asked = []  # (device type, device) of each question for a stream


@FROM_PY
def tensor_from_py(owner, out):
    t = out[0]
    t.data, t.device_type, t.device_id, t.ndim = 0x1000, 2, owner.device, 2
    t.code, t.bits, t.lanes, t.shape, t.strides, t.byte_offset = 2, 32, 1, owner.shape, None, 0
    return 0


@STREAM
def current_stream(kind, device, out):
    asked.append((kind, device))
    out[0] = 0
    return 0


TABLE = ExchangeApi(1, 3, None, None, None, None, ctypes.cast(tensor_from_py, ctypes.c_void_p).value,
                    ctypes.cast(current_stream, ctypes.c_void_p).value)  # fmt: skip
NAME = b"dlpack_exchange_api"
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class OnCuda:
    """Looks like a (2, 4) float32 tensor of a CUDA device that is not there."""

    __dlpack_c_exchange_api__ = new_capsule(ctypes.addressof(TABLE), NAME, None)

    def __init__(self, device):
        self.device, self.shape = device, (ctypes.c_int64 * 2)(2, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would reach for memory that is not there")
def test_a_cuda_tensor_where_there_is_no_gpu():
    x, cpu = OnCuda(1), torch.zeros(2, 4)
    asked.clear()
    if not _C.info()["cuda_built"] or EMULATED:
        kind, message = NotImplementedError, r"\[rms_norm\] x must be on the cpu, but got cuda:1"
        if not EMULATED:
            message += ": this build of pyllm has no CUDA kernels"
    else:
        kind, message = RuntimeError, r"\[cuda\] the current device failed: "
    with pytest.raises(kind, match=message):
        _C.norm_forward(x, None, None, None, OnCuda(1), None, None, False, 1e-6)
    assert asked == [(2, 1), (2, 1)]
    with pytest.raises(NotImplementedError, match=r"\[rms_norm\] y must be on the cpu, but got cuda:0"):
        _C.norm_forward(cpu, None, None, None, OnCuda(0), None, None, False, 1e-6)
    with pytest.raises(NotImplementedError, match=r"\[linear\] x must be on the cpu, but got cuda:1"):
        _C.linear(x, cpu, None, cpu, False)
    assert torch.equal(ops.layer_norm(cpu), cpu)  # and nothing of that stays


class Old:
    """A CUDA tensor of a library without the exchange table."""

    def __init__(self):
        self.tensor = DLTensor(0x1000, 2, 0, 2, 2, 32, 1, (ctypes.c_int64 * 2)(2, 4), None, 0)

    def __dlpack__(self, stream=None):
        return new_capsule(ctypes.addressof(self.tensor), b"dltensor", None)


def test_a_cuda_tensor_without_the_exchange_table():
    with pytest.raises(NotImplementedError, match="must come through DLPack's exchange table"):
        _C.norm_forward(Old(), None, None, None, torch.zeros(2, 4), None, None, False, 1e-6)


@pytest.mark.skipif(_C.info()["cuda_built"], reason="of a build without CUDA")
def test_a_build_without_cuda_says_so():
    with pytest.raises(NotImplementedError, match=r"\[synchronize\] this build of pyllm has no CUDA kernels"):
        pyllm.synchronize()
    assert not any("cuda" in backends for backends in pyllm.info()["ops"].values())


@pytest.mark.parametrize("name", sorted(GOOD))
def test_the_operations_with_cuda_kernels_are_those_that_are_listed(name, device):
    if not EMULATED:
        pytest.skip("counts launches of the emulator")
    if name in ("linear", "linear_cross_entropy"):
        return  # whose products are torch's on a CUDA device: an emulated one does not reach them
    before = _C._emulated_launches()
    getattr(ops, name)(**GOOD[name])
    assert (_C._emulated_launches() > before) == (name in ops.CUDA), name
    assert ("cuda" in pyllm.info()["ops"][name]) == (name in ops.CUDA)


def test_names_are_of_operations():
    assert set(ops.__all__) >= ops.CUDA


def test_a_tensor_elsewhere_is_refused(device):
    if device.type != "cuda":
        pytest.skip("needs two kinds of devices")
    x = torch.randn(2, 4, device=device)
    with pytest.raises(ValueError, match=r"\[layer_norm\] weight must be on cuda:0, but got DLPack device type 1"):
        ops.layer_norm(x, torch.ones(4))
    with pytest.raises(NotImplementedError, match=r"\[layer_norm\] weight must be on the cpu, but got cuda:0"):
        ops.layer_norm(x.cpu(), torch.ones(4, device=device))


def test_a_work_stream_is_the_one_that_torch_has(device):
    if device.type != "cuda":
        pytest.skip("needs streams")
    x = torch.randn(4096, 4096, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # for x
    with torch.cuda.stream(stream):
        y = x
        for _ in range(50):
            y = ops.layer_norm(y + 1)
    stream.synchronize()
    expected = x
    for _ in range(50):
        expected = ops.layer_norm(expected + 1)
    assert torch.equal(y, expected)


def test_python_holds_no_reference_to_what_was_refused():
    x = OnCuda(3)
    count = sys.getrefcount(x)
    with pytest.raises((NotImplementedError, RuntimeError)):
        _C.linear(x, x, None, x, False)
    assert sys.getrefcount(x) == count
