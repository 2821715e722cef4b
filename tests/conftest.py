import os
from pathlib import Path

import hypothesis
import pytest
import torch

from pyllm import _C

hypothesis.settings.register_profile("pyllm", deadline=None)  # no test of the clock
hypothesis.settings.load_profile("pyllm")


@pytest.fixture(params=_C.info()["isas"])
def isa(request):
    """Runs the test once for each instruction set of this machine."""
    chosen = _C.info()["isa"]
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(chosen)


def _kernels():
    """Each instruction set of this machine, whole and then without each of what a processor may have beside it."""
    chosen, found = _C.info()["isa"], []
    for isa in _C.info()["isas"]:
        _C.set_isa(isa)
        found += [isa] + [f"{isa} without {part}" for part in ("amx", "vnni") if _C.info()[part]]
    _C.set_isa(chosen)
    return found


@pytest.fixture(params=_kernels())
def kernels(request):
    """As `isa`, for kernels that take tile registers or dot products of bytes where the processor has them."""
    chosen = _C.info()["isa"]
    isa, _, missing = request.param.partition(" without ")
    _C.set_isa(isa)
    _C.set_amx(not missing)  # tiles come first: what is without dot products is without tiles too
    _C.set_vnni(missing != "vnni")
    yield request.param
    _C.set_amx(True)
    _C.set_vnni(True)
    _C.set_isa(chosen)


@pytest.fixture
def threads():
    """A function that sets the number of threads; the number is put back at the end."""
    before = _C.num_threads()
    yield _C.set_num_threads
    _C.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that lies beside the repository, or where PYLLM_SHARED_DATA says."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PYLLM_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"needs the real data of {folder}")
    return folder
