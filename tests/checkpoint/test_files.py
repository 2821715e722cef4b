"""Safetensors files that are wrong in every way, beside good ones that the library wrote."""

import json
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyllm import _C
from pyllm.checkpoint import CheckpointError
from pyllm.checkpoint.safetensors import read_tensors, write_tensors

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [2], "data_offsets": [24, 26]},
}


def file_of(header, data=bytes(26)):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def changed(**entry):
    return {"a": GOOD["a"] | entry, "b": GOOD["b"]}


def test_the_library_and_we_agree(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(GOOD))
    assert {k: v.shape for k, v in read_tensors(path).items()} == {"a": (2, 3), "b": (2,)}
    tensors = {"a.b": torch.randn(3, 4), "空": torch.randn(2).bfloat16(), "": torch.tensor(3), "z": torch.empty(4, 0)}
    for write in (write_tensors, lambda path, tensors: safetensors.torch.save_file(tensors, path, {"format": "pt"})):
        write(path, tensors)
        for read in (read_tensors, safetensors.torch.load_file):
            found = read(path)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    write_tensors(path, {})
    assert read_tensors(path) == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "must begin with the 8-byte size of its header, but has 0 bytes"),
        (b"1234567", "but has 7 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "must hold a header of 9223372036854775808 bytes, but has 10 bytes"),
        (struct.pack("<Q", 3) + b"{}", "must hold a header of 3 bytes, but has 10 bytes"),
        (file_of(b""), "its header must be JSON, but: Expecting value"),
        (file_of(b"{"), "its header must be JSON"),
        (file_of(b"\xff\xfe"), "its header must be JSON"),
        (file_of(b"[" * 100_000), "its header must be JSON"),
        (file_of([]), "its header must be a JSON object"),
        (file_of(b'{"a": {"dtype": "U8", "shape": [26], "data_offsets": [0, 26]}, "a": 1}'), "but has 'a' twice"),
        (file_of({"a": 3}), "'a' must have dtype, shape and data_offsets, but got 3"),
        (file_of({"a": {"dtype": "F32", "shape": [2]}}), "'a' must have dtype, shape and data_offsets"),
        (file_of(changed(dtype="F31")), "'a' must have one of the dtypes .*, but got 'F31'"),
        (file_of(changed(dtype=["F32"])), "'a' must have one of the dtypes"),
        (file_of(changed(shape=6)), "'a' must have a shape of sizes that memory can hold, but got 6"),
        (file_of(changed(shape=[-2, -3])), r"but got \[-2, -3\]"),
        (file_of(changed(shape=[2.0, 3])), r"but got \[2\.0, 3\]"),
        (file_of(changed(shape=[True, 6])), r"but got \[True, 6\]"),
        (file_of(changed(shape=[2**32, 2**32])), "must have a shape of sizes that memory can hold"),
        (file_of(changed(shape=[0, 2**40, 2**40])), "must have a shape of sizes that memory can hold"),
        (file_of(changed(shape=[1] * 70)), "must have a shape of sizes that memory can hold"),
        (
            file_of(changed(shape=[3, 3])),
            r"'a' of F32 and shape \[3, 3\] must have 36 bytes, but has offsets",
        ),
        (file_of(changed(shape=[2**40])), "must have 4398046511104 bytes"),
        (file_of(changed(data_offsets=[24, 0])), "must have 24 bytes"),
        (file_of(changed(data_offsets=[0])), r"must have data_offsets \[begin, end\], but got \[0\]"),
        (file_of(changed(data_offsets=[-24, 0])), r"must have data_offsets"),
        (file_of(changed(data_offsets=[1, 25])), "'a' must begin at byte 0, but does at 1"),
        (file_of(GOOD | {"b": GOOD["a"]}), "'b' must begin at byte 24, but does at 0"),
        (file_of(GOOD, bytes(25)), "must have 26 bytes behind its header, but has 25"),
        (file_of(GOOD, bytes(27)), "must have 26 bytes behind its header, but has 27"),
        (file_of({"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\2"), "must hold booleans"),
    ],
    ids=range(31),
)
def test_a_wrong_file_is_an_error(tmp_path, data, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_tensors(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value) and len(str(error.value)) < 500


@given(st.data())
def test_any_change_to_a_header_is_an_error_or_a_tensor(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    whole = bytearray(file_of(GOOD))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 27))] = data.draw(
            st.sampled_from(b'{}[]":,.-0123456789eabFU\\\n\x00\xff')
        )
    path.write_bytes(whole)
    try:
        tensors = read_tensors(path)
    except CheckpointError:
        return
    assert sum(t.nbytes for t in tensors.values()) == 26


def test_tensors_are_written_in_order_and_aligned(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"odd": torch.ones(3, dtype=torch.uint8), "half": torch.ones(5, dtype=torch.float16)}
    tensors |= {f"b{i}": torch.full((8, 8), float(i)) for i in (2, 0, 1)} | {"long": torch.ones(3, dtype=torch.int64)}
    write_tensors(path, tensors)
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    assert list(header) == ["__metadata__", "b2", "b0", "b1", "long", "half", "odd"] and (8 + length) % 64 == 0
    for name, tensor in tensors.items():
        begin = 8 + length + header[name]["data_offsets"][0]
        assert begin % (64 if name[0] == "b" else tensor.itemsize) == 0


def summed(data: bytes) -> np.ndarray:
    """What `_C.checksum` makes, word by word."""
    sums = []
    for begin in range(0, len(data), 1 << 20):
        block = data[begin : begin + (1 << 20)]
        words = np.frombuffer(block + bytes(-len(block) % 256), np.uint32).reshape(-1, 64)
        h = np.arange(1, 65, dtype=np.uint32) * np.uint32(0x9E3779B1)
        for row in words:
            x = h ^ row
            h = (x << np.uint32(15) | x >> np.uint32(17)) * np.uint32(0x9E3779B1)
        sums.append(h)
    return np.array(sums)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000, (1 << 20) + 300])
def test_checksums_are_the_same_on_all_kernels_and_see_each_change(isa, size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)

    def found():
        sums = torch.empty(-(-size // (1 << 20)), 64, dtype=torch.int32)
        _C.checksum(data, sums)
        return sums.numpy().view(np.uint32)

    before = found().copy()
    np.testing.assert_array_equal(before, summed(data.tobytes()))
    for at in {0, size // 2, size - 1}:
        for bit in (1, 128):
            data[at] ^= bit
            assert (found() != before).any()
            data[at] ^= bit
    with pytest.raises(ValueError, match=r"\[checksum\] sums must"):
        _C.checksum(data, torch.empty(3, 64, dtype=torch.int32))
