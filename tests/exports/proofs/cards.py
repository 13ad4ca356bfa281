"""The lines of a model card, run as a user runs them: beside the folder."""

import subprocess
from pathlib import Path
from typing import Any

from loraq.integrations.diffusers import _quiet_diffusers


def lines_of(folder: Path) -> str:
    """Return the lines that load a folder, by its own card."""
    return (folder / "README.md").read_text().split("```\n")[1]


def run_card(folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Run the Python of a card, with this dtype in place of its bfloat16; return its names."""
    found: dict[str, Any] = {}
    with _quiet_diffusers():
        exec(lines_of(folder).replace("torch.bfloat16", f"torch.{dtype}"), found)
    return found


def run_shell(folder: Path) -> None:
    """Run the shell commands of a card."""
    subprocess.run(["bash", "-euc", lines_of(folder)], check=True, cwd=folder.parent)
