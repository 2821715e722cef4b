"""Wrong pickled weights: `cases` yields (what is wrong, {file: bytes})."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator

import torch
from checkpoint import malformed


def right() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(malformed.values(name)) for name in malformed.SHAPES}


def saved(contents, *, old: bool = False) -> bytes:
    data = io.BytesIO()
    torch.save(contents, data, _use_new_zipfile_serialization=not old)
    return data.getvalue()


def packed(changes: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The right archive with other members."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(right()))) as old, zipfile.ZipFile(made, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, (changes or {}).get(name.partition("/")[2], old.read(name)))
    return made.getvalue()


def folder(data: bytes) -> dict[str, bytes]:
    return {"config.json": json.dumps(malformed.CONFIG).encode(), "pytorch_model.bin": data}


class Code:
    def __reduce__(self):
        return os.system, ("exit 3",)


def cases() -> Iterator[tuple[str, dict[str, bytes]]]:
    whole = {False: saved(right()), True: saved(right(), old=True)}
    for old, data in whole.items():
        kind = "old" if old else "new"
        for at in (1, 3, 30, 200, len(data) // 2, len(data) - 1):
            yield f"{kind}, cut at {at}", folder(data[:at])
        embedding, name = right()["model.embed_tokens.weight"], "model.embed_tokens.weight"
        wrong = {
            "no tensors": [1, 2],
            "a tensor alone": torch.ones(3),
            "a number for a name": right() | {3: torch.ones(2)},
            "a text for a tensor": right() | {name: "x"},
            "nested": {"model": right()},
            "a shape": {name: embedding.T},
            "code": Code(),
            "code inside": right() | {"x": Code()},
            "a sparse tensor": right() | {"x": torch.eye(3).to_sparse()},
            "elements that repeat": right() | {name: torch.ones(1).expand(malformed.VOCAB, malformed.DIM)},
            "elements that many share": right() | {f"x{i}": embedding for i in range(9)},
            "whole numbers": right() | {name: embedding.long()},
        }
        for what, contents in wrong.items():
            yield f"{kind}, {what}", folder(saved(contents, old=old))
    more = pickle.dumps({}, 2)
    for what, data in {
        "compressed": packed(compression=zipfile.ZIP_DEFLATED),
        "compressed zeros": packed({"data/0": bytes(1 << 25)}, zipfile.ZIP_DEFLATED),
        "compressed zeros behind the pickle": packed({"data.pkl": more + bytes(1 << 25)}, zipfile.ZIP_DEFLATED),
        "a member of another size": packed({"data/0": bytes(7)}),
        "no member": packed({"data.pkl": b""}),
        "a long text": packed({"data.pkl": b"\x80\x02X\xff\xff\xff\xff"}),
        "a global": packed({"data.pkl": b"\x80\x02cos\nsystem\nX\x06\0\0\0exit 3\x85R."}),
    }.items():
        yield what, folder(data)
    count = malformed.VOCAB * malformed.DIM
    size = b"M" + count.to_bytes(2, "little")
    assert size in whole[True]
    for what, data in {
        "old, a huge storage": whole[True].replace(size, b"J\0\0\0\x70"),
        "old, a huge storage in a big number": whole[True].replace(size, b"\x8a\x08" + (1 << 61).to_bytes(8, "little")),
        "old, a storage below 0": whole[True].replace(size, b"J\xff\xff\xff\xff"),
        "old, an unknown storage": whole[True].replace(b"FloatStorage", b"OtherStorage"),
        "old, no magic number": more * 5,
    }.items():
        assert data != whole[True]
        yield what, folder(data)
    for what, data in {
        "a long text alone": b"\x80\x02X\xff\xff\xff\xff",
        "long bytes": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little"),
        "a long number": b"\x80\x02\x8b\xff\xff\xff\x7f",
        "a long frame": b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little"),
        "a far memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "code alone": b"cos\nsystem\n(S'exit 3'\ntR.",
        "an extension": b"\x80\x02\x82\x01.",
        "a line without end": b"c" + b"x" * 100_000,
    }.items():
        yield what, folder(data)
