"""The command line, a file a command: `pyllm train | generate | chat | evaluate | quantize | export | bench | info`."""

from pyllm.cli import train, generate, chat, evaluate, quantize, export, bench, info  # isort: skip  # in the order of --help
from pyllm.cli.app import app, main

__all__ = ["app", "bench", "chat", "evaluate", "export", "generate", "info", "main", "quantize", "train"]
