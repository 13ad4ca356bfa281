"""The command line: parse, call the library, print.

Results go to stdout, progress and errors to stderr.

Everything that needs torch is imported inside the commands, so that help does not wait for it.
"""

from loraq.cli import (
    contents,
    demo,
    doctor,
    evaluate,
    export,
    importing,
    lora,
    quantize,
    stats,
)
from loraq.cli.command import main

__all__ = [
    "contents",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "importing",
    "lora",
    "main",
    "quantize",
    "stats",
]
