"""Races providers on one shape, interleaved: A B C A B C ..., medians over the rounds, ratios of the same rounds.

  python3 race.py qwen05 --bits 8                                  # the peers alone
  python3 race.py qwen05 --bits 8 --add 'pyllm=.venv/bin/python benchmarks/provider.py {folder} {bits}'
  python3 race.py 15m --bits 4 --batch 8,32 --rounds 5 --only llama.cpp,onnxruntime
  python3 race.py 15m --bits 8 --load 4 --add 'pyllm=.venv/bin/python benchmarks/mixed_load.py {folder} {bits} {load}'

With --load it is the mixed load of load.py, by those who can take it: 0 for all requests at once, or how many arrive
in a second.

An added provider is a command that prints, as the last line, a JSON object with the keys of providers.py (prefill,
decode, decode8, ..., load_s, peak_rss_mib) measured as described there; {folder} is the shape's Hugging Face folder,
{bits} one of 32, 16, 8, 4, {batch} the list, {load} the options of load.py. Ratios are the first added provider (or
the first of all) over each other one: above 1, it is faster (for times and peak_rss_mib: smaller). Needs the standard
library alone.
"""

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = pathlib.Path(os.environ.get("PEERS", pathlib.Path.home() / ".cache/pyllm-peers"))
KINDS = {  # bits -> provider -> (venv, kind, what must exist in the shape's folder)
    "32": {
        "llama.cpp": ("main", "f32", "f32.gguf"),
        "ctranslate2": ("main", "float32", "ct2-float32"),
        "transformers": ("main", "fp32", "model.safetensors"),
    },
    "16": {"llama.cpp": ("main", "bf16", "bf16.gguf"), "transformers": ("main", "bf16", "model.safetensors")},
    "8": {
        "llama.cpp": ("main", "q8_0", "q8_0.gguf"),
        "ctranslate2": ("main", "int8", "ct2-int8"),
        "openvino": ("openvino", "int8", "openvino-int8"),
    },
    "4": {
        "llama.cpp": ("main", "q4_0", "q4_0.gguf"),
        "openvino": ("openvino", "int4", "openvino-int4"),
        "onnxruntime": ("onnx", "int4", "onnx-int4"),
    },
}

TAKE_A_LOAD = ("openvino", "ctranslate2")


def busy():
    fields = [int(x) for x in pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4]


def settle(limit=0.15, patience=20):
    """Waits until the rest of the machine uses less than `limit` cores for a second."""
    end = time.time() + patience
    while time.time() < end:
        before = busy()
        time.sleep(1)
        if (busy() - before) / os.sysconf("SC_CLK_TCK") < limit:
            return


def once(command):
    settle()
    p = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="2", TRANSFORMERS_OFFLINE="1", HF_HUB_OFFLINE="1"),
    )
    lines = p.stdout.strip().splitlines()
    if p.returncode or not lines or not lines[-1].startswith("{"):
        raise SystemExit(f"{shlex.join(map(str, command))} failed ({p.returncode}):\n{(p.stderr or p.stdout)[-1500:]}")
    return json.loads(lines[-1])


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("shape")
    a.add_argument("--bits", default="8", choices=KINDS)
    a.add_argument("--batch", default="")
    a.add_argument("--load", type=float, default=None)
    a.add_argument("--rounds", type=int, default=3)
    a.add_argument("--add", action="append", default=[])
    a.add_argument("--only", default="")
    a.add_argument("--json", action="store_true")
    a = a.parse_args()
    folder = ROOT / "models" / a.shape
    load = ["--rate", str(a.load)] if a.load else []
    racers = {}
    for spec in a.add:
        name, command = spec.split("=", 1)
        racers[name] = shlex.split(command.format(folder=folder, bits=a.bits, batch=a.batch, load=shlex.join(load)))
    for name, (venv, kind, need) in KINDS[a.bits].items():
        if (a.only and name not in a.only.split(",")) or (a.load is not None and name not in TAKE_A_LOAD):
            continue
        python = ROOT / venv / "bin/python"
        if not python.exists() or not (folder / need).exists():
            print(
                f"left out: {name} (no {python if not python.exists() else folder / need}; see setup and convert.py)",
                file=sys.stderr,
            )
            continue
        racers[name] = [python, HERE / "providers.py", name, folder, kind, "--batch", a.batch]
        if a.load is not None:
            racers[name] = [python, HERE / "load.py", name, folder, kind, *load]
    if not racers:
        raise SystemExit("nothing to race")
    rounds = [{name: once(command) for name, command in racers.items()} for _ in range(a.rounds)]
    first = next(iter(racers))
    smaller = {"seconds", "first_s", "first95_s", "load_s", "peak_rss_mib"}
    result = {}
    for key in rounds[0][first]:
        row = {}
        for name in racers:
            values = [r[name][key] for r in rounds if key in r[name]]
            if not values:
                continue
            ratios = [
                (r[name][key] / r[first][key]) if key in smaller else (r[first][key] / r[name][key])
                for r in rounds
                if key in r[name]
            ]
            row[name] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                f"{first}_ratio": round(statistics.median(ratios), 3),
            }
        result[key] = row
    if a.json:
        print(json.dumps({"shape": a.shape, "bits": a.bits, "rounds": a.rounds, "result": result}))
        return
    print(f"{a.shape}, {a.bits} bits, {a.rounds} rounds, 2 threads; in brackets min to max; x: {first} over it")
    for key, row in result.items():
        print(
            f"{key:14s}"
            + "".join(
                f"  {name} {v['median']:.5g} [{v['min']:.5g}..{v['max']:.5g}]"
                + ("" if name == first else f" x{v[first + '_ratio']:.2f}")
                for name, v in row.items()
            )
        )


main()
