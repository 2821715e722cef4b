from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from rich.filesize import decimal
from rich.table import Table
from typer import Argument

import pyllm
from pyllm.cli.app import app, out
from pyllm.engine import describe


@app.command()
def info(
    path: Annotated[Path | None, Argument(help="A checkpoint of any kind.", show_default=False)] = None,
):
    """Version, instruction sets, threads, devices, operations; or what a checkpoint is, and what loading it takes."""
    if path is not None:
        out.print(_description(describe(path)))
        return
    facts = pyllm.info()
    table = Table(show_header=False)
    for name, value in facts.items():
        if name != "ops":
            table.add_row(name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    out.print(table)
    backends = Table("operation", "backends")
    for name, where in facts["ops"].items():
        backends.add_row(name, ", ".join(where))
    out.print(backends)


def _description(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    told = facts["tokenizer"]
    text = "none"
    if told is not None:
        text = f"{told['kind']}, vocabulary {told['vocabulary']:,}"
        text += f", BOS {told['bos']}{' (always)' if told['add_bos'] else ''}" if told["bos"] else ""
        text += f", EOS {' '.join(told['eos'])}" if told["eos"] else ""
        text += ", chat template" if told["chat_template"] else ""
    widened = facts["memory"] > 1.01 * facts["disk"]
    whole, of = (facts["memory"], "the weights when widened") if widened else (facts["disk"], "the files")
    rows = {
        "family": facts["family"] or "none",
        "model": facts["model"],
        "config": ", ".join(f"{k} {v}" for k, v in facts["config"].items() if v is not None and v is not False),
        "parameters": f"{facts['parameters']:,}",
        "dtypes": _shares(facts["dtypes"]),
        "bits a weight": f"{8 * facts['memory'] / facts['parameters']:.2f}",
        "stored as": ", ".join(f"{kind} ({count})" for kind, count in (facts["stored"] or {}).items()),
        "context": "no limit" if facts["context"] is None else f"{facts['context']:,}",
        "tokenizer": text,
        "each step": f"runs in Python: {facts['unrecorded']}" if facts["unrecorded"] else "",
        "on disk": decimal(facts["disk"]),
        "in memory": decimal(facts["memory"]),
        "peak while loading": f"{decimal(facts['peak'])}, {facts['peak'] / whole:.2f} of {of}",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


def _shares(dtypes: dict[str, int]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return ", ".join(f"{name} ({count / sum(dtypes.values()):.1%})" for name, count in dtypes.items())
