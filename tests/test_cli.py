"""The command line as a user meets it: a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache

import pytest

from pyllm.checkpoint import load_checkpoint
from pyllm.data import embedded_corpus

TEXT = embedded_corpus()[:8000]
SMALL = ["--hidden", "16", "--layers", "1", "--heads", "2", "--context", "16", "--batch", "4"]


def pyllm(*arguments, **options):
    command = [sys.executable, "-m", "pyllm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def fails(*arguments):
    """The message of a call that must fail with one line and exit code 2."""
    done = pyllm(*arguments)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == "", done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def train(corpus, tmp_path_factory):
    """A function from a model's name to a folder in which the command line trained it."""

    @cache
    def folder_of(model):
        folder = tmp_path_factory.mktemp("trained") / model
        tokenizer = "bpe:300" if model == "gpt" else "char"
        done = pyllm("train", "--model", model, "--data", corpus, "--tokenizer", tokenizer, "--out", folder,
                     "--steps", 30, *SMALL)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "validation" in done.stdout and "perplexity" in done.stdout
        return folder

    return folder_of


@pytest.mark.parametrize("model", ["rnn", "gru", "lstm", "gpt"])
def test_train_generate_evaluate(model, train, corpus):
    trained = train(model)
    options = ["--seed", 3, "--max-tokens", 8, "--temperature", 0.8, "--top-k", 20, "--top-p", 0.9, "--min-p", 0.01,
               "--repetition-penalty", 1.1]  # fmt: skip
    first, second = (
        pyllm("generate", trained, "the ", *options),
        pyllm("generate", trained, "the ", "--stream", *options),
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the ") and len(first.stdout) > 6
    assert first.stdout == second.stdout
    done = pyllm("evaluate", trained, "--data", corpus)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("loss", "perplexity", "bits a byte", "accuracy"))


def test_an_rwkv_is_trained(train, corpus):
    saved = load_checkpoint(train("rwkv"))
    assert saved.model_type == "rwkv" and saved.config["head_dim"] == 8
    losses = saved.training["history"]["losses"]
    assert losses[-1] < losses[0] and saved.training["state"]["lengths"].tolist() == [30 * 16] * 4
    new = ["--out", corpus.parent / "new"]
    assert "--hidden must be" in fails("train", "--model", "rwkv", "--data", corpus, "--hidden", 10, *new)


def test_several_files_and_resume_refuses_other_settings(corpus, tmp_path):
    other = tmp_path / "more.txt"
    other.write_text(TEXT.upper())
    folder = tmp_path / "model"
    done = pyllm("train", "--data", corpus, other, "--steps", 3, "--out", folder, *SMALL)
    assert done.returncode == 0, done.stderr
    settings = load_checkpoint(folder).training["settings"]
    assert settings["data"] == [str(corpus), str(other)]
    assert "add --resume" in fails("train", "--data", corpus, "--out", folder)
    assert "--hidden was 16" in fails("train", "--resume", "--hidden", 32, "--out", folder)


STOPPED = """
import os, signal
from pyllm.cli import main
from pyllm.training import loop

saves, save = [], loop.save_checkpoint

def stop(*arguments, **options):
    save(*arguments, **options)
    saves.append(os.kill(os.getpid(), signal.SIGINT) if len(saves) == 2 else None)

loop.save_checkpoint = stop
main()
"""  # Ctrl-C after the third checkpoint, however fast steps are


def test_ctrl_c_then_resume_gives_the_losses_of_an_uninterrupted_training(corpus, tmp_path):
    arguments = ["train", "--model", "lstm", "--data", corpus, "--dropout", "0.1", "--steps", "30", *SMALL]
    arguments[arguments.index("1")] = "2"  # two layers, so that there is dropout between them
    assert pyllm(*arguments, "--out", tmp_path / "whole").returncode == 0
    folder = tmp_path / "stopped"
    command = [sys.executable, "-c", STOPPED, *map(str, arguments), "--out", str(folder), "--save-every", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "go on with --resume" in done.stderr
    assert len(load_checkpoint(folder).training["history"]["losses"]) in (3, 4)
    resumed = pyllm("train", "--resume", "--out", folder)
    assert resumed.returncode == 0, resumed.stderr
    losses = [load_checkpoint(f).training["history"]["losses"] for f in (tmp_path / "whole", folder)]
    assert losses[0] == losses[1]


def test_export_and_info(train, tmp_path):
    trained, file, folder = train("gpt"), tmp_path / "m.gguf", tmp_path / "folder"
    done = pyllm("export", trained, file, "--gguf", "--dtype", "float16")
    assert done.returncode == 0 and "weights, logits and tokens are those of" in done.stderr, done.stderr
    done = pyllm("export", file, folder)
    assert done.returncode == 0 and sorted(os.listdir(tmp_path)) == ["folder", "m.gguf"], done.stderr
    done = pyllm("info", folder)
    assert done.returncode == 0, done.stderr
    for words in ("llama", "float16", "vocabulary 300", "hidden_size 16", "peak while loading", "of the files"):
        assert words in done.stdout
    assert "must be a new file" in fails("export", trained, file, "--gguf")
    assert "none is made for LanguageModel" in fails("export", train("lstm"), tmp_path / "x")
    assert "nowhere" in fails("info", tmp_path / "nowhere")
    assert sorted(os.listdir(tmp_path)) == ["folder", "m.gguf"]


def test_quantize(train, corpus, tmp_path):
    trained = train("gpt")
    done = pyllm("quantize", trained, "--to", "int4-min", "--out", tmp_path / "small", "--skip", "*.down",
                 "--calibration", corpus, "--data", corpus)  # fmt: skip
    assert done.returncode == 0 and "4 layers as int4-min" in done.stderr, done.stderr
    before, after = (line.split("│")[1:5] for line in done.stdout.splitlines() if "before" in line or "after" in line)
    assert float(before[2]) == 32 > float(after[2])
    assert float(before[3]) == pytest.approx(float(after[3]), rel=0.05)
    done = pyllm("evaluate", tmp_path / "small", "--data", corpus)
    assert f"{float(after[3]):.3f}" in done.stdout
    done = pyllm("info", tmp_path / "small")
    assert "int4-min" in done.stdout and "int8" in done.stdout and "bits a weight" in done.stdout
    done = pyllm("quantize", train("lstm"), "--to", "int8", "--out", tmp_path / "lstm", "--dtype", "bfloat16")
    assert done.returncode == 0 and "perplexity" not in done.stdout
    kept = {str(w.dtype) for name, w in load_checkpoint(tmp_path / "lstm").weights.items() if ".panels" not in name}
    assert kept == {"torch.bfloat16", "torch.int64"}  # biases and the embedding; layouts
    new = ["--out", tmp_path / "new"]
    assert "small is not empty" in fails("quantize", trained, "--to", "int8", "--out", tmp_path / "small")
    assert "float64" in fails("quantize", trained, "--to", "int8", "--dtype", "float64", *new)
    assert "int3" in fails("quantize", trained, "--to", "int3", *new)
    assert "skip must name layers" in fails("quantize", trained, "--to", "int8", "--skip", "tail", *new)
    assert "nowhere" in fails("quantize", tmp_path / "nowhere", "--to", "int8", *new)
    assert "missing.txt" in fails("quantize", trained, "--to", "int8", "--data", tmp_path / "missing.txt", *new)
    assert sorted(os.listdir(tmp_path)) == ["lstm", "small"]


def test_mistakes_are_one_line_and_exit_code_2(train, corpus, tmp_path):
    trained = load_checkpoint(train("gpt")).folder
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    new = ["--out", tmp_path / "new"]
    assert "missing.txt" in fails("train", "--data", tmp_path / "missing.txt", *new)
    assert "empty" in fails("train", "--data", empty, *new)
    assert "tokens" in fails("train", "--data", short, *new)
    assert "binary.txt" in fails("train", "--data", binary, *new)
    assert "char, bpe:SIZE, unigram:SIZE" in fails("train", "--data", corpus, "--tokenizer", "words", *new)
    assert "multiple of num_heads" in fails("train", "--data", corpus, "--hidden", 10, "--heads", 4, *new)
    assert "--modle" in fails("train", "--modle", "gpt", *new)
    assert "transformer" in fails("train", "--model", "transformer", *new)
    assert not (tmp_path / "new").exists()
    assert "nowhere" in fails("generate", tmp_path / "nowhere", "the")
    assert "top_p" in fails("generate", trained, "the", "--top-p", 2)
    assert "threads" in fails("generate", trained, "the", "--threads", 0)
    assert "softmaxx" in fails("bench", "softmaxx")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        copy = tmp_path / f"cut-{name}"
        copy.mkdir()
        for file in trained.iterdir():
            content = file.read_bytes()
            (copy / file.name).write_bytes(content[: len(content) // 2] if file.name == name else content)
        assert name in fails("generate", copy, "the")
    other = tmp_path / "other-sizes"
    shutil.copytree(trained, other)
    config = json.loads((other / "config.json").read_text())
    config["config"]["hidden_size"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    assert "must be" in fails("generate", other, "the")


def test_info_and_help():
    done = pyllm("info", env=os.environ | {"PYLLM_ISA": "baseline"})
    assert done.returncode == 0, done.stderr
    assert "baseline" in done.stdout and "attention" in done.stdout and "torch" in done.stdout
    assert "PYLLM_ISA must be one of" in fails_with_isa("mmx")
    done = pyllm("--help")
    assert done.returncode == 0 and all(
        c in done.stdout for c in ("train", "generate", "evaluate", "quantize", "export", "bench", "info")
    )
    assert pyllm("train", "--help").returncode == 0


def fails_with_isa(name):
    done = pyllm("info", env=os.environ | {"PYLLM_ISA": name})
    assert done.returncode != 0
    return done.stderr
