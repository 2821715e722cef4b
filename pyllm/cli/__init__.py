"""The command line, a file a command: `pyllm train | generate | evaluate | quantize | export | bench | info`."""

from pyllm.cli import train, generate, evaluate, quantize, export, bench, info  # isort: skip  # in the order of --help
from pyllm.cli.app import app, main

__all__ = ["app", "bench", "evaluate", "export", "generate", "info", "main", "quantize", "train"]
