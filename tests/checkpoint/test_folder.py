import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint.example import TOKENIZER, check, save, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.checkpoint import CheckpointError, load_checkpoint

FILES = ["config.json", "generation_config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json",
         "tokenizer_config.json", "training.json"]  # fmt: skip


def test_what_is_saved_comes_back(tmp_path):
    folder = tmp_path / "runs" / "a"
    new = save(folder)
    assert sorted(os.listdir(new)) == FILES and os.listdir(folder) == [new.name]
    for path in (folder, str(folder), new):
        checkpoint = load_checkpoint(path)
        check(checkpoint)
        assert checkpoint.folder == new
    assert load_checkpoint(folder, training=False).training is None
    assert (new / "config.json").stat().st_mode & 0o777 == (new / "model.safetensors").stat().st_mode & 0o777
    assert new.stat().st_mode == folder.stat().st_mode


def test_the_new_takes_the_place_of_the_old(tmp_path):
    (tmp_path / "loss.png").write_bytes(b"not ours")
    for value in (1.0, 2.0, 3.0):
        save(tmp_path, value)
        check(load_checkpoint(tmp_path), value)
        assert len(os.listdir(tmp_path)) == 2
    assert (tmp_path / "loss.png").exists()


def test_without_tokenizer_and_training(tmp_path):
    new = save(tmp_path, tokenizer=None, training=None)
    assert sorted(os.listdir(new)) == ["config.json", "model.safetensors"]
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.tokenizer is None and checkpoint.training is None
    save(tmp_path, tokenizer=None, training={})
    assert load_checkpoint(tmp_path).training == {}


def test_the_whole_tokenizer_comes_back(tmp_path):
    make, (contents, arguments) = TOKENIZER.__reduce__()
    changes = {"bos_id": 1, "add_bos": True, "eos_ids": (1, 2), "chat_template": "{{ bos_token }}"}
    save(tmp_path, tokenizer=make(contents, arguments | changes))
    tokenizer = load_checkpoint(tmp_path).tokenizer
    assert {name: getattr(tokenizer, name) for name in changes} == changes
    assert tokenizer.encode("the") == [1, *TOKENIZER.encode("the")]


def test_older_checkpoints_with_tokenizer_json_alone_are_read(tmp_path):
    folder = save(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for name in ("model.safetensors", "optimizer.safetensors"):
        contents = (folder / name).read_bytes()
        config["files"][name] = {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text("{}")
        del config["files"][name]
    (folder / "config.json").write_text(json.dumps(config))
    check(load_checkpoint(folder))


def test_tied_weights_are_stored_once(tmp_path):
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(50, 16), "head": torch.nn.Linear(16, 50, bias=False)})
    model["head"].weight = model["embedding"].weight
    new = save(tmp_path, weights=model.state_dict())
    assert (new / "model.safetensors").stat().st_size < 50 * 16 * 4 + 200
    loaded = load_checkpoint(tmp_path).weights
    assert loaded["head.weight"] is loaded["embedding.weight"]
    assert torch.equal(loaded["head.weight"], model["head"].weight)


def test_weights_of_all_layouts(tmp_path):
    base = torch.randn(6, 10)
    many = {
        "whole": base, "rows": base[2:4], "column": base[:, 3], "transposed": base.t(), "flat": base.view(-1),
        "scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "none again": torch.empty(0, 4), "bool": base > 0,
        "grad": base.clone().requires_grad_(), "expanded": torch.ones(1).expand(4), "名.\n": base.half(),
        **{str(dtype): base.abs().to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.float8_e4m3fn,
                                                          torch.int64, torch.int8, torch.uint8, torch.uint16)},
    }  # fmt: skip
    save(tmp_path, weights=many)
    loaded = load_checkpoint(tmp_path).weights
    assert loaded.keys() == many.keys()
    for name, tensor in many.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].contiguous().view(-1).view(torch.uint8),
                           tensor.detach().contiguous().view(-1).view(torch.uint8))  # fmt: skip
    loaded["whole"].zero_()
    assert torch.equal(loaded["flat"], base.view(-1)), "memory is shared that was seen in two ways"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
trees = st.recursive(leaves, lambda t: st.lists(t, max_size=4) | st.dictionaries(st.text("ab/.$", max_size=3), t))


@settings(max_examples=30)
@given(st.dictionaries(st.text("ab", max_size=3), trees, max_size=4))
def test_training_values_come_back_exactly(tmp_path_factory, training):
    folder = tmp_path_factory.mktemp("exact")
    save(folder, training=training)
    assert repr(load_checkpoint(folder).training) == repr(training)
    shutil.rmtree(folder)


def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path):
    save(tmp_path)
    before = os.listdir(tmp_path)
    for changes, kind, message in [
        ({"config": {"a": [1, float("nan")]}}, ValueError, r"config\.a\[1\] must be finite, but got nan"),
        ({"config": {"a": 2**63}}, ValueError, r"config\.a must be a 64-bit integer"),
        ({"config": {1: 2}}, TypeError, "config must have keys that are strings, but got 1"),
        ({"config": {"dtype": torch.float32}}, TypeError, r"config\.dtype must be what JSON can hold, but got dtype"),
        ({"config": [1]}, TypeError, "config must be a dict, but got list"),
        ({"model_type": None}, TypeError, "model_type must be a str, but got NoneType"),
        ({"weights": {"w": [1.0]}}, TypeError, "weights must map names to tensors, but got 'w': list"),
        ({"weights": {"w": torch.ones(2, device="meta")}}, TypeError, "w must be a dense tensor of a dtype"),
        ({"weights": {"w": torch.ones(2).to_sparse()}}, TypeError, "w must be a dense tensor of a dtype"),
        ({"weights": {"w": torch.ones(2, dtype=torch.complex64)}}, TypeError, "w must be a dense tensor of a dtype"),
        ({"training": {"a": {"b": print}}}, TypeError, "training/a/b must be a tensor or what JSON can hold"),
        ({"training": {"a": {3: 4}}}, TypeError, "training/a must have keys that are strings, but got 3"),
        ({"training": {"$tensor": 4}}, ValueError, r"training must not use the key \$tensor"),
        ({"training": {"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}}, ValueError, "two have this path"),
        ({"training": [1]}, TypeError, "training must be a dict, but got list"),
    ]:
        with pytest.raises(kind, match=message):
            save(tmp_path, 2.0, **changes)
        assert os.listdir(tmp_path) == before
    with pytest.raises(UnicodeEncodeError):
        save(tmp_path, 2.0, model_type="\ud800")
    assert os.listdir(tmp_path) == before
    check(load_checkpoint(tmp_path))


def test_folders_that_hold_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        load_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="must hold a checkpoint"):
        load_checkpoint(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        load_checkpoint(tmp_path / "file")
    new = save(tmp_path / "run")
    with pytest.raises(FileExistsError, match="but is one itself"):
        save(new)


@pytest.mark.parametrize(("name", "mapped"), [*((name, False) for name in FILES), ("model.safetensors", True)])
def test_a_damaged_file_is_named(tmp_path, name, mapped):
    path = save(tmp_path) / name
    whole, digest = path.read_bytes(), "checksum" if name.endswith(".safetensors") else "SHA-256"
    cuts = {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 2}
    for data in [whole[:cut] for cut in cuts if cut < len(whole)] + [whole + b"x", b"\xff" + whole[1:]]:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=re.escape(str(path))) as error:
            load_checkpoint(tmp_path, mapped=mapped)
        assert "\n" not in str(error.value)
    if name != "config.json":
        for at in range(0, len(whole), max(1, len(whole) // 50)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(CheckpointError, match=f"{name} is damaged: its {digest} must be"):
                load_checkpoint(tmp_path, mapped=mapped)
    path.unlink()
    with pytest.raises(CheckpointError, match=name if name != "config.json" else "must hold|missing"):
        load_checkpoint(tmp_path, mapped=mapped)
    if name in ("training.json", "optimizer.safetensors"):
        assert load_checkpoint(tmp_path, training=False).weights.keys() == weights().keys()


def test_a_damaged_config_is_described(tmp_path):
    path = save(tmp_path) / "config.json"
    whole = json.loads(path.read_text())
    files = whole["files"]
    model = files["model.safetensors"]

    def lacking(name):
        return {k: v for k, v in files.items() if k != name}

    for changes, message in [
        ({"format": None}, "must be of format 'pyllm', version 1, but is of format None"),
        ({"version": 2}, "but is of format 'pyllm', version 2"),
        ({"model_type": 3}, "model_type must be a str, but got 3"),
        ({"config": []}, r"config must be a dict, but got \[\]"),
        ({"config": {"a": float("inf")}}, r"config\.a must be finite, but got inf"),
        ({"config": {"a": 10**30}}, r"config\.a must be a 64-bit integer"),
        ({"tied": {"a": "b"}}, "tied must name weights of model.safetensors, but got 'a': 'b'"),
        ({"tied": {"head.bias": "head.bias"}}, "tied must name weights"),
        ({"tied": {"a": ["b"]}}, "tied must name weights"),
        ({"files": {}}, "files must name those of a checkpoint, but got "),
        ({"files": lacking("model.safetensors")}, "files must name those of a checkpoint"),
        ({"files": lacking("training.json")}, "files must name those of a checkpoint"),
        ({"files": files | {"../a": model}}, r"files must name those of a checkpoint, but got .*\.\./a"),
        (
            {"files": files | {"model.safetensors": 3}},
            "files: model.safetensors must have bytes and sha256 or checksum, but got 3",
        ),
        ({"files": files | {"model.safetensors": {"bytes": 7, "md5": "0"}}}, "must have bytes and sha256 or checksum"),
        ({"files": files | {"model.safetensors": model | {"sha256": "0"}}}, "must have bytes and sha256 or checksum"),
        ({"files": files | {"model.safetensors": model | {"bytes": 7}}}, "must have 7 bytes, but has"),
        ({"files": files | {"model.safetensors": model | {"checksum": "0"}}}, "its checksum must be 0, but is"),
        ({"files": files | {"model.safetensors": {"bytes": model["bytes"], "sha256": "0"}}}, "SHA-256 must be 0"),
    ]:
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)
    for text in ("[" * 100_000, '{"a":' * 400 + "1" + "}" * 400, '{"a": 1, "a": 2}', "1" * 5000, "[]", "null"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_checkpoint(tmp_path)
    for depth in range(700, 1100, 20):
        path.write_text(json.dumps(whole)[:-1] + ', "config": ' + '{"a":' * depth + "1" + "}" * depth + "}")
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path)


def test_a_writer_stopped_anywhere(tmp_path):
    tests = Path(__file__).resolve().parents[1]
    out = subprocess.run([sys.executable, tests / "checkpoint" / "stopped_writers.py", tmp_path],
                         env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path])},
                         capture_output=True, text=True)  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
