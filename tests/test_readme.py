"""Every snippet of the README runs, in order, in a folder that holds nothing but a text and a file of prompts."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pyllm.data import embedded_corpus

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "story.txt").write_text(embedded_corpus()[:30000], encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once"}\n{"prompt": "The", "temperature": 0}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(language):
    found = re.findall(rf"```{language}\n(.*?)```", README, re.S)
    assert found
    return found


def test_python_snippets(folder):
    names: dict = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)


def test_commands(folder):
    ran = 0
    for line in "\n".join(blocks("sh")).splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] == "make":  # the make targets are what the continuous integration runs
            continue
        assert words[0] == "pyllm"
        done = subprocess.run(
            [sys.executable, "-m", *words], capture_output=True, text=True, timeout=120, env=os.environ
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        ran += 1
    assert ran


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (Path(__file__).parents[1] / target).exists(), target
