"""The compiled module itself: its symbols, its instruction sets, what it takes as a tensor, its threads."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import pyllm
from pyllm import _C, ops, reference

ROOT = Path(__file__).parents[1]


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def output(code: str, **environment: str) -> str:
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- symbols ----


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_kernels_define_nothing_outside_their_namespace(isa):
    """Else the linker may keep for everyone a copy of a function that only some machines can run."""
    if isa not in _C.info()["isas"] and isa != "avx512":
        pytest.skip(f"{isa} is not built")
    builds = [p.parent for p in ROOT.glob("build/*/CMakeCache.txt") if "PYLLM_SANITIZE:STRING=\n" in p.read_text()]
    objects = [o for b in builds for o in b.glob(f"CMakeFiles/kernels_{isa}.dir/csrc/cpu/kernels/*.o")]
    if not objects:
        pytest.skip("the objects that pyllm was linked from are not here")
    for path in objects:
        table = subprocess.run(
            ["nm", "--defined-only", "--format=posix", path], capture_output=True, text=True, check=True
        )
        for name, kind, *_ in (line.split() for line in table.stdout.splitlines()):
            assert kind not in "VvWwu", f"{path.name}: weak symbol {name}"
            assert kind.islower() or name.startswith(f"_ZN5pyllm{len(isa)}{isa}"), f"{path.name}: {kind} {name}"


def test_the_module_exports_one_symbol():
    table = subprocess.run(["nm", "-D", "--defined-only", _C.__file__], capture_output=True, text=True, check=True)
    ours = [line.split()[-1] for line in table.stdout.splitlines() if "pyllm" in line or "PyInit" in line]
    assert ours == ["PyInit__C"]


# ---- instruction sets ----


def test_the_environment_forces_an_instruction_set():
    assert output("import pyllm; print(pyllm._C.info()['isa'])", PYLLM_ISA="baseline") == "baseline"


def test_a_wrong_instruction_set_is_a_clear_error():
    done = run("import pyllm", PYLLM_ISA="mmx")
    assert done.returncode != 0
    assert f"PYLLM_ISA must be one of {', '.join(_C.info()['isas'])} on this machine, but got 'mmx'" in done.stderr
    with pytest.raises(ValueError, match="PYLLM_ISA must be one of baseline"):
        _C.set_isa("")


# ---- what counts as a tensor ----


class OnlyDLPack:
    """An array of some other library, as old as DLPack 0.x: no exchange table, no max_version."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, stream=None):
        return self.tensor.__dlpack__()

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def normalise(x, y):
    _C.norm_forward(x, None, None, None, y, None, None, True, 1e-5)
    return y


def test_arrays_of_other_libraries():
    x = torch.randn(4, 9)
    expected = ops.layer_norm(x)
    for wrap in (lambda t: t.numpy(), OnlyDLPack, torch.nn.Parameter):
        y = torch.empty(4, 9)
        normalise(wrap(x), wrap(y).detach() if isinstance(wrap(y), torch.nn.Parameter) else wrap(y))
        assert torch.equal(y, expected)
    strided = torch.randn(4, 18)[:, ::2]
    with pytest.raises(ValueError, match="stride 1 in its last dimension, but got 2"):
        normalise(strided.numpy(), torch.empty(4, 9))


def test_a_read_only_array_is_read_but_never_written():
    x, y = np.random.rand(4, 9).astype(np.float32), np.zeros((4, 9), np.float32)
    x.flags.writeable = False
    normalise(x, y)
    assert y.any()
    y.flags.writeable = False
    before = y.copy()
    with pytest.raises(ValueError, match=r"\[layer_norm\] y must be writable, but got a read-only array"):
        normalise(x, y)
    assert (y == before).all()


def test_dtypes_and_devices_that_no_kernel_takes():
    y = torch.empty(4, 9)
    for x, message in (
        (torch.ones(4, 9, dtype=torch.complex64), "dtype must be"),
        (np.ones((4, 9), np.float64), "must be float32, bfloat16 or float16, but got float64"),
        (torch.ones(4, 9, dtype=torch.int32), "must be float32, bfloat16 or float16, but got int32"),
    ):
        with pytest.raises(TypeError, match=message):
            normalise(x, y)
    with pytest.raises(ValueError, match="0 to 8 dimensions, but got 9"):
        normalise(torch.ones((1,) * 9), y)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        normalise([[1.0]], y)
    with pytest.raises((NotImplementedError, BufferError, RuntimeError)):
        normalise(torch.ones(4, 9, device="meta"), y)


def test_a_view_does_not_keep_or_leak_its_tensor():
    x = np.ones((4, 9), np.float32)
    counts = sys.getrefcount(x)
    for _ in range(10):
        normalise(x, np.empty((4, 9), np.float32))
    assert sys.getrefcount(x) == counts


def test_a_torch_without_the_exchange_table():
    """Before 2.10, tensors come through __dlpack__, which in still older ones does not know max_version."""
    code = """
import torch
from torch import Tensor
for t in Tensor.__mro__:
    if "__dlpack_c_exchange_api__" in vars(t): del t.__dlpack_c_exchange_api__
assert not hasattr(Tensor, "__dlpack_c_exchange_api__")
from pyllm import ops
new = Tensor.__dlpack__
for route in (new, lambda self, stream=None: new(self)):
    Tensor.__dlpack__ = route
    torch.manual_seed(0)
    x, w = torch.randn(6, 40, requires_grad=True), torch.nn.Parameter(torch.randn(40))
    y = ops.layer_norm(x.bfloat16(), w)
    y.float().sin().sum().backward()
    print(y.double().sum().item(), x.grad.double().sum().item())
"""
    torch.manual_seed(0)
    x, w = torch.randn(6, 40, requires_grad=True), torch.nn.Parameter(torch.randn(40))
    y = ops.layer_norm(x.bfloat16(), w)
    y.float().sin().sum().backward()
    expected = f"{y.double().sum().item()} {x.grad.double().sum().item()}"
    assert output(code).splitlines() == [expected, expected]


# ---- threads ----


@pytest.mark.parametrize("pool", ["own", "torch"])
def test_same_bits_for_any_threads_from_any_thread_and_after_a_fork(pool):
    code = """
import os, threading, warnings
import torch, pyllm
from pyllm import _C, ops

warnings.simplefilter("ignore")  # Python's, about forking with threads
torch.manual_seed(0)
x, w = torch.randn(300, 200), torch.randn(100, 200)
_C.set_num_threads(1)
expected = ops.linear(x, w)

def same(times):
    return all(torch.equal(ops.linear(x, w), expected) for _ in range(times))

for n in (2, 5, 3, 2):
    _C.set_num_threads(n)
    assert same(5), n

results = []
threads = [threading.Thread(target=lambda: results.append(same(50))) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
assert results == [True] * 4

x @ w.T  # torch's threads run
child = os.fork()
if child == 0:  # where the parent's threads do not exist
    os._exit(0 if same(20) and _C.info()["thread_backend"] == "pool" else 1)
assert os.waitpid(child, 0)[1] == 0
assert same(5)
print(_C.info()["thread_backend"])
"""
    backend = output(code, PYLLM_POOL="own" if pool == "own" else "")
    assert backend == "pool" if pool == "own" else backend in ("openmp", "pool")


def test_kernels_let_other_python_threads_run():
    x, w = torch.randn(1000, 500), torch.randn(800, 500)
    seen, stop = [], threading.Event()

    def count():
        while not stop.is_set():
            seen.append(1)

    thread = threading.Thread(target=count)
    thread.start()
    before = len(seen)
    for _ in range(5):
        ops.linear(x, w)
    stop.set()
    thread.join()
    assert len(seen) > before


def test_the_number_of_threads_is_checked():
    for n in (0, -1, 5000):
        with pytest.raises(ValueError, match=f"num_threads must be 1 to 4096, but got {n}"):
            _C.set_num_threads(n)


# ---- the package ----


def test_the_version_is_one():
    assert f'version = "{pyllm.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_twins_stand_alone():
    """pyllm.reference never reaches the compiled module."""
    for path in Path(reference.__file__).parent.glob("*.py"):
        assert "_C" not in path.read_text() and "pyllm.ops" not in path.read_text(), path
