"""Where `pyllm.load` looks, and what it says where there is nothing."""

import copy
import json
import sys
import types

import pytest
import torch
from checkpoint import malformed

import pyllm
from pyllm.checkpoint import CheckpointError, hub
from pyllm.engine import generate_ids


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(malformed.CONFIG))
    (tmp_path / "model.safetensors").write_bytes(malformed.safetensors())
    return tmp_path


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_file_shards_and_pickles_make_the_same_model(folder):
    model, tokenizer = pyllm.load(folder)
    assert not model.training and tokenizer is None
    tensors = {name: torch.from_numpy(malformed.values(name)) for name in malformed.SHAPES}
    names = list(tensors)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert same(pyllm.load(folder)[0], model)
    (folder / "pytorch_model.bin").unlink()
    torch.save({name: tensors[name] for name in names[:9]}, folder / "a.bin")
    torch.save({name: tensors[name] for name in names[9:]}, folder / "b.bin")
    index = {"weight_map": {name: "a.bin" if i < 9 else "b.bin" for i, name in enumerate(names)}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same(pyllm.load(folder)[0], model)
    torch.save(tensors, folder / "b.bin")
    with pytest.raises(CheckpointError, match="must hold each weight once"):
        pyllm.load(folder)


@pytest.mark.parametrize("ours", [False, True])
def test_weights_are_mapped_and_their_files_never_changed(folder, tmp_path, ours):
    (pyllm.save if ours else pyllm.export)(pyllm.load(folder)[0], tmp_path / "saved")
    (file,) = (folder := tmp_path / "saved").glob("**/model.safetensors")
    before = file.read_bytes()
    mapped, copied = pyllm.load(folder)[0], pyllm.load(folder, mapped=False)[0]
    learning = pyllm.load(folder)[0].train()
    optimizer = torch.optim.SGD(learning.parameters(), 0.1)
    learning.loss(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)).backward()
    optimizer.step()
    assert same(mapped, copied) and not same(mapped, learning) and file.read_bytes() == before
    again = learning.state_dict()
    file.write_bytes(bytes(len(before)))  # what is forbidden: who shares the file's pages sees it
    weight = "blocks.0.feed_forward.down.weight"
    assert copied.state_dict()[weight].any() and not mapped.state_dict()[weight].any()
    assert torch.equal(again[weight], learning.state_dict()[weight])


def test_transposed_weights_lie_in_their_file_until_that_costs_something(tmp_path, monkeypatch):
    options = {"position": "learned", "norm": "layer_norm", "activation": "gelu_tanh", "bias": True, "qkv_bias": True}
    pyllm.Decoder(61, 32, 2, 4, context_length=64, **options).save(tmp_path / "gpt2")
    mapped, copied = (pyllm.load(tmp_path / "gpt2", mapped=m)[0] for m in (True, False))

    def turned(model):
        return {m.weight.is_contiguous() for b in model.blocks for m in b.modules() if isinstance(m, pyllm.nn.Linear)}

    for shape in ((1, 1), (1, 5), (3, 40)):
        ids = torch.arange(shape[0] * shape[1]).view(shape) % 61
        assert torch.equal(mapped(ids), copied(ids))
    linear = sys.modules["pyllm.ops.linear"]
    for rows, room in ((4, True), (5, True), (5, False)):  # for packed copies, which take any layout
        assert turned(mapped) == {False} and turned(copied) == {True}
        linear._copies.clear()
        monkeypatch.setattr(linear, "_fits", lambda weight, room=room: room)
        prompts = [[i, 7] for i in range(rows)]
        sampling = pyllm.SamplingParams(seed=1)
        ids = [list(generate_ids(model, prompts, sampling, max_tokens=6)) for model in (mapped, copied)]
        assert ids[0] == ids[1]
    assert turned(mapped) == {True} and same(mapped, copied)
    other = pyllm.load(tmp_path / "gpt2")[0]
    other.to("cpu").eval()
    assert turned(other) == {False} and turned(copy.deepcopy(other).bfloat16()) == {True}
    optimizer = pyllm.training.AdamW(other.train().parameters())
    other.loss(ids := torch.ones(1, 4, dtype=torch.int64), ids).backward()
    optimizer.step()
    assert turned(other) == {True} and not same(other, copied)


def test_the_tokenizer_can_be_left_unread(folder, tmp_path):
    tokenizer = pyllm.Tokenizer.train("char", "abc")
    pyllm.save(pyllm.load(folder)[0], tmp_path / "ours", tokenizer)
    tokenizer.save(folder)
    for path in (tmp_path / "ours", folder):
        assert pyllm.load(path)[1].encode("ab") == tokenizer.encode("ab")
        for file in path.glob("**/tokenizer.json"):
            file.write_text("{")
        assert pyllm.load(path, tokenizer=False)[1] is None
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            pyllm.load(path)


def test_a_model_that_was_loaded_is_saved_as_our_own(folder, tmp_path):
    model, _ = pyllm.load(folder)
    pyllm.save(model, tmp_path / "ours")
    again, _ = pyllm.load(tmp_path / "ours", dtype=torch.bfloat16)
    assert again.head.weight.dtype == torch.bfloat16 and same(again, model.bfloat16())


def test_a_model_of_our_own_keeps_its_tied_weights(tmp_path):
    model = pyllm.Decoder(40, 16, 1, 2)
    pyllm.save(model, tmp_path)
    again, _ = pyllm.load(tmp_path)
    assert again.head.weight is again.embedding.weight and again.num_parameters() == model.num_parameters()


def test_all_that_is_wrong_with_the_weights_is_listed(folder):
    changes = {"model.embed_tokens.weight": {"shape": [16, 32]}, "x": {"dtype": "F32", "shape": [0],
               "data_offsets": [0, 0]}}  # fmt: skip
    names = [name for name in malformed.SHAPES if name != "model.norm.weight"]
    (folder / "model.safetensors").write_bytes(malformed.safetensors(names, changes))
    with pytest.raises(CheckpointError) as error:
        pyllm.load(folder)
    for part in ("embed_tokens.weight", "(32, 16)", "(16, 32)", "model.norm.weight", "x (0,)"):
        assert part in str(error.value)


def test_code_from_a_checkpoint_is_refused(folder):
    for kind in ("llama", "mystery"):
        config = malformed.CONFIG | {"model_type": kind, "auto_map": {"AutoModel": "code.Model"}}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"auto_map.* never"):
            pyllm.load(folder)


@pytest.mark.parametrize("dtype", ["float32", torch.int64])
def test_a_dtype_that_is_none_for_weights_is_refused(folder, dtype):
    with pytest.raises(TypeError, match=r"\[load\] dtype must be a floating-point torch.dtype"):
        pyllm.load(folder, dtype=dtype)


@pytest.fixture
def hugging_face(monkeypatch):
    """Puts a function in the place of huggingface_hub's."""

    def put(download):
        module = types.ModuleType("huggingface_hub")
        if download is not None:
            module.snapshot_download = download
        monkeypatch.setitem(sys.modules, "huggingface_hub", module if download else None)

    return put


def test_a_name_on_the_hub_is_downloaded(folder, hugging_face, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    hugging_face(download)
    assert same(pyllm.load("owner/name")[0], pyllm.load(folder)[0])
    assert [name for name, _ in asked] == ["owner/name"] and "model.safetensors" in asked[0][1]
    assert not any(pattern.endswith((".py", ".bin")) for pattern in asked[0][1])


@pytest.mark.parametrize(
    "name", ["nothing", "/nothing/here", "./a/b", "a/b/c", "../a", "a/b.gguf", "a/..", "", "-a/b", "a/b\n"]
)
def test_what_is_no_name_is_not_asked_for(hugging_face, name):
    hugging_face(lambda name, **_: pytest.fail(f"asked for {name}"))
    with pytest.raises(FileNotFoundError, match="must be a file, a folder, or owner/name"):
        hub.download(name)


def test_without_the_package_or_the_network_the_error_says_so(hugging_face):
    hugging_face(None)
    with pytest.raises(FileNotFoundError, match=r"needs the package huggingface_hub: pip install pyllm\[hub\]"):
        pyllm.load("owner/name")

    def offline(name, **_):
        raise ConnectionError("offline mode\nis enabled")

    hugging_face(offline)
    with pytest.raises(FileNotFoundError, match=r"cannot be had .* ConnectionError: offline mode is enabled"):
        pyllm.load("owner/name")
