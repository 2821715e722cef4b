"""A program that hands wrong files to the readers and prints a line of JSON for each: what came of it, the least
processor time of three attempts, and a bound on the memory that was asked for.

Memory is address space: what is reserved counts, used or not, by whichever library. The bound is the most that the
process ever had, less what it had before; there is a new process for every 32 files.
"""

import gc
import json
import os
import tempfile
import time
from pathlib import Path

from checkpoint import malformed, malformed_marian, malformed_pickles, malformed_text

import pyllm
from pyllm.checkpoint.gguf import open_gguf
from pyllm.checkpoint.llama2c import open_llama2c
from pyllm.checkpoint.safetensors import open_shards
from pyllm.text import Tokenizer
from pyllm.text.chat import render

GGUF_NAMES = {malformed.gguf_name(name): name for name in malformed.SHAPES}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
ALONE = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "x.model", "x.bin")  # tokenizers in files


def read(kind: str, folder: Path) -> object:
    """What a reader makes of a folder's file: of weights, the config and all of them."""
    if kind == "folder" or kind.startswith("m."):
        model, _ = pyllm.load(folder if kind == "folder" else folder / kind)
        return None, {name: model.state_dict()[name] for name in ("embedding.weight", "norm.weight")}
    if kind == "tokenizer" or kind in ALONE:
        return Tokenizer.load(folder if kind == "tokenizer" else folder / kind)
    if kind == "template":
        return render((folder / kind).read_text("utf-8", "surrogatepass"), TALK)
    if kind == "llama2c":
        config, reader = open_llama2c(folder / "m.bin")
    elif kind == "gguf":
        reader = open_gguf(folder / "m.gguf")
    else:
        config, reader = None, open_shards(folder)
    with reader:
        if kind == "gguf":
            config = reader.config
        return config, {GGUF_NAMES.get(name, name): reader.read(name) for name in reader.entries()}


def cases():
    pickles = [(f"pickle: {what}", "folder", files) for what, files in malformed_pickles.cases()]
    marians = [(f"Marian's: {what}", "tokenizer", files) for what, files in malformed_marian.cases()]
    return [*malformed.cases(), *malformed_text.cases(), *pickles, *marians]


def right():
    """What the wrong ones are made of."""
    yield "folder", malformed.folder(malformed.CONFIG)
    for old in (False, True):
        yield "folder", malformed_pickles.folder(malformed_pickles.saved(malformed_pickles.right(), old=old))
    yield "tokenizer", malformed_marian.folder()
    for _, kind, files in malformed_text.right():
        yield kind, files


def attempt(kind: str, folder: Path) -> dict:
    before, seconds, found = memory("VmSize"), [], {}
    for _ in range(3):
        begin = time.process_time()
        try:
            read(kind, folder)
            found = {"error": "", "message": "it was read"}
        except BaseException as e:
            found = {"error": type(e).__name__, "message": str(e)}
        seconds.append(time.process_time() - begin)
    return found | {"seconds": min(seconds), "bytes": memory("VmPeak") - before}


def memory(which: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(which))


def apart(some: list[tuple[str, dict[str, bytes]]], folder: Path) -> int:
    """Attempts in a process of their own, whose memory begins at what is in use here. Returns how many were made."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        with os.fdopen(send, "w") as out:
            for kind, files in some:
                write(folder, files)
                print(json.dumps(attempt(kind, folder)), file=out, flush=True)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as result:
        said = result.read().splitlines()
    status = os.waitpid(child, 0)[1]
    if status:
        said.append(json.dumps({"error": f"status {status}", "message": "", "seconds": 0, "bytes": 0}))
    print(*said, sep="\n", flush=True)
    return len(said)


def write(folder: Path, files: dict[str, bytes]) -> None:
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="refused-") as name:
        folder = Path(name)
        for kind, files in right():
            write(folder, files)
            read(kind, folder)  # loads what loads, so that it is not counted
        rest = [case[1:] for case in cases()]
        gc.freeze()
        while rest:
            rest = rest[apart(rest[:32], folder) :]


if __name__ == "__main__":
    main()
