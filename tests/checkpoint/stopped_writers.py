"""Stops writers of checkpoints in a folder (the argument) in every way and place, and reads what they leave.

A program of its own, as it forks. First a writer is stopped at each thing that it does to the file system (Python
announces them to audit hooks): at once, as by kill -9, or by an exception, as by Ctrl-C or a full disk. Then writers
are killed at any time while their checkpoints are read.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

from checkpoint.example import check, save

from pyllm.checkpoint import load_checkpoint

NOT_STOPPED, KILLED, RAISED, SWALLOWED = 0, 9, 5, 7
left = 0
stop = None


def hook(event, _):
    global left
    if stop is not None and event.partition(".")[0] in ("open", "os", "shutil", "tempfile"):
        left -= 1
        if left == 0:
            if stop == "kill":
                os._exit(KILLED)
            raise stop


def write(folder: Path, how, count: int) -> int:
    """Saves 2.0 in a process that is stopped at its event number count."""
    global left, stop
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left, stop = count, how
    try:
        save(folder, 2.0)
        os._exit(NOT_STOPPED if left > 0 else SWALLOWED)
    except type(how) as e:
        os._exit(RAISED if e is how else 1)
    finally:
        os._exit(1)


def stopped_at_each_event(parent: Path, how) -> None:
    old = new = 0
    for count in range(1, 1000):
        folder = Path(tempfile.mkdtemp(dir=parent))
        save(folder, 1.0)
        status = write(folder, how, count)
        found = load_checkpoint(folder)
        value = found.training["step"]
        check(found, value)
        assert value in (1, 2)
        if status == RAISED and value == 1:
            assert os.listdir(folder) == ["checkpoint-000001"], "the exception left something behind"
        save(folder, 3.0)
        check(load_checkpoint(folder), 3.0)
        assert os.listdir(folder) == [load_checkpoint(folder).folder.name], "the next writer left something behind"
        if status == NOT_STOPPED:
            assert value == 2
            break
        assert status in ((KILLED,) if how == "kill" else (RAISED, SWALLOWED)), (status, how)
        old, new = old + (value == 1), new + (value == 2)
    print(how, "old", old, "new", new)
    assert old > 10 and new > 2, "the events are no longer seen"


def killed_while_read(folder: Path) -> None:
    save(folder, 1.0)
    latest, seen = 1, set()
    for reads in range(20):
        child = os.fork()
        if not child:
            for value in range(latest + 1, 1 << 24):
                save(folder, float(value))
        for _ in range(reads):
            found = load_checkpoint(folder)
            assert found.training["step"] >= latest, "an older checkpoint came back"
            latest = found.training["step"]
            check(found, latest)
            seen.add(latest)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        latest = load_checkpoint(folder).training["step"]
        check(load_checkpoint(folder), latest)
    print("read", len(seen), "of", latest)


if __name__ == "__main__":
    os.fsync = lambda _: None  # what was written survives the process, and that is all that can be stopped here
    sys.addaudithook(hook)
    for how in ("kill", KeyboardInterrupt(), OSError(28, "No space left on device")):
        stopped_at_each_event(Path(sys.argv[1]), how)
    killed_while_read(Path(tempfile.mkdtemp(dir=sys.argv[1])))
