"""The commands that run on the engine: files of prompts, and conversations."""

import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import pyllm.cli
from pyllm.cli.chat import Conversation

TEXT = "the quick brown fox jumps over the lazy dog. " * 3
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def new(kind, context=200):
    tokenizer = pyllm.Tokenizer.train("bpe:280", [TEXT])
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(3)
    if kind == "lstm":
        model = pyllm.LanguageModel(tokenizer.vocab_size, 16, 1)
        model.head.bias.data[tokenizer.eos_id] = -1e4  # what it says has no end
        return model, tokenizer
    return pyllm.Decoder(tokenizer.vocab_size, 16, 2, 2, context_length=context), tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "lstm"
    pyllm.save(*new("lstm")[:1], folder, new("lstm")[1])
    return folder


def begin(*arguments):
    command = [sys.executable, "-m", "pyllm", *map(str, arguments)]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background may ignore it
    return subprocess.Popen(command, text=True, errors="replace", preexec_fn=heed, **pipes)


def test_a_file_of_prompts_is_gone_on_with_after_ctrl_c(saved, tmp_path):
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "the", "max_tokens": n} for n in (1, 10**9)]
    file.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["generate", saved, "--prompts", file, "--out", out, "--seed", 1]
    process = begin(*arguments)
    while not out.exists() or not out.read_bytes().endswith(b"\n"):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and f"1 of 2 are in {out}; the same command goes on" in stderr, stderr
    kept = json.loads(out.read_text())
    assert kept["line"] == 1 and kept["reason"] in ("length", "stop")
    file.write_text("\n".join(map(json.dumps, [lines[0], lines[1] | {"max_tokens": 2}])))
    process = begin(*arguments)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and f"saved to {out}: 2" in stderr, stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found[0] == kept and found[1]["line"] == 2
    for wrong, message in (({"prompts": file}, "given together"), ({"out": out}, "given together"),
                           ({"prompts": file, "out": out, "prompt": "the"}, "must not both be given")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pyllm.cli.generate.generate(saved, **wrong)


def test_chat_ends_an_answer_by_ctrl_c_and_itself_at_the_end(saved):
    process = begin("chat", saved, "--seed", 1, "--context", 10**9)  # no answer ends before it is told to
    stdout = process.stdout.fileno()
    for _ in range(2):
        process.stdin.write("the\n")
        process.stdin.flush()
        os.read(stdout, 1)
        process.send_signal(signal.SIGINT)
        assert any("interrupted" in line for line in process.stderr)
        os.set_blocking(stdout, False)
        with contextlib.suppress(BlockingIOError):  # the rest of this answer is not the next one's beginning
            while os.read(stdout, 1 << 16):
                pass
        os.set_blocking(stdout, True)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and not stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_chat_heeds_ctrl_c_while_an_object_is_finalised(capsys):
    class Dropped:
        def __del__(self):  # what it raises, Python reports and drops
            signal.raise_signal(signal.SIGINT)

    class Talk:
        forgotten = 0

        def say(self, line):
            yield line
            Dropped()
            yield from "!" * 100

    pyllm.cli.chat._answer(Talk(), "the")
    out, err = capsys.readouterr()
    assert out == "the!" and "(interrupted)" in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_beams(saved, capsys):
    model, tokenizer = pyllm.load(saved)
    for options in ({}, {"length_penalty": -3.0}):
        pyllm.cli.generate.generate(saved, "the", num_beams=3, max_tokens=6, **options)
        best = pyllm.Engine(model, tokenizer, max_length=20).beam_search("the", 3, max_tokens=6, **options)[0]
        assert capsys.readouterr().out == "the" + best.text + "\n"
    for wrong, message in (({"prompts": saved, "out": saved}, "--num-beams is for one prompt"),
                           ({"temperature": 0.5}, "without settings for drawing"),
                           ({"num_beams": 1, "length_penalty": 2.0}, "must be with --num-beams of 2")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pyllm.cli.generate.generate(saved, **{"num_beams": 2} | wrong)


def test_chat_answers_each_line(saved, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("the\n\nquick"))
    pyllm.cli.chat.chat(saved, max_tokens=5, seed=2)
    conversation = Conversation(*pyllm.load(saved), pyllm.SamplingParams(0.7, seed=2), max_tokens=5)
    assert capsys.readouterr().out == "".join("".join(conversation.say(said)) + "\n" for said in ("the", "quick"))
    with pytest.raises(ValueError, match="top_p"):
        pyllm.cli.chat.chat(saved, top_p=2)


@pytest.mark.parametrize("kind", ["llama", "lstm"])
def test_a_conversation_is_what_its_template_says(kind):
    model, tokenizer = new(kind)
    params = pyllm.SamplingParams(seed=5)
    conversation = Conversation(model, tokenizer, params, system="be brief", max_tokens=20)
    messages = [{"role": "system", "content": "be brief"}]
    for said in ("the", "quick brown fox", "jumps"):
        messages.append({"role": "user", "content": said})
        text = tokenizer.apply_chat_template(messages)
        answer = "".join(conversation.say(said))
        assert answer == pyllm.generate(model, tokenizer, text, seed=5, max_tokens=20)
        messages.append({"role": "assistant", "content": answer})
    assert conversation.messages == messages[1:] and not conversation.forgotten


@pytest.mark.parametrize("kind", ["llama", "lstm"])
def test_a_turn_reads_what_is_new_alone(kind, monkeypatch):
    model, tokenizer = new(kind)
    conversation = Conversation(model, tokenizer, pyllm.SamplingParams(seed=5), max_tokens=10)
    read, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: (read.append(ids.shape[1]), hidden(ids, *rest))[1])
    for said in ("the quick brown fox jumps " * 5, "over"):
        read.clear()
        list(conversation.say(said))
    assert max(read) <= len(tokenizer.encode_chat(conversation.messages[:3])) - 64


def test_what_is_old_is_forgotten_and_what_is_too_long_refused():
    model, tokenizer = new("llama", context=60)
    conversation = Conversation(model, tokenizer, pyllm.SamplingParams(seed=3), system="hi", max_tokens=15)
    for turn in range(4):
        list(conversation.say(f"fox {turn}"))
        assert len(tokenizer.encode_chat([*conversation.system, *conversation.messages[:-1]])) <= 45
    assert conversation.forgotten and conversation.messages[-2]["content"] == "fox 3"
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="the conversation has room for 45"):
        list(conversation.say("x" * 100))
    answer = conversation.say("the")
    assert conversation.messages == before
    first = next(answer)
    answer.close()
    assert conversation.messages[-1]["content"] == first and not conversation.engine._running
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(model, tokenizer)
