"""What a plain `pip install loraq` must do, run by `make test-bare` in an environment of its own.

No test framework is there, and none of the extras: nothing but the wheel and what it requires.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import loraq

README = Path(__file__).parents[2] / "README.md"
OPTIONAL = ("diffusers", "transformers", "accelerate", "peft", "sklearn", "matplotlib", "pytest")


def main() -> None:
    """Run the lines of the README, and the commands that need no extra."""
    present = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    if present:
        raise SystemExit(f"{', '.join(present)} can be imported: this is not a bare environment.")
    if Path(loraq.__file__).is_relative_to(README.parent / "src"):
        raise SystemExit(f"{loraq.__file__} is imported, which is the checkout and not the wheel.")
    examples = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)
    plain = [code for code in examples if "diffusers" not in code]
    if not plain:
        raise SystemExit("The README has no lines that run without extras.")
    with tempfile.TemporaryDirectory() as place:
        for code in plain:
            subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=place, check=True)
        run = [sys.executable, "-m", "loraq"]
        for words in (["formats"], ["methods"], ["doctor"], ["inspect", "out"], ["--help"]):
            subprocess.run([*run, *words], cwd=place, check=True, stdout=subprocess.DEVNULL)
        emoji = ["--emoji", str(README.parent / "benchmarks" / "assets" / "emoji")]
        for words, wanted in ([], "make demo"), (emoji, 'pip install "loraq[demo]"'):
            told = subprocess.run([*run, "demo", *words], cwd=place, capture_output=True, text=True)
            if told.returncode == 0 or wanted not in told.stderr:
                raise SystemExit(f"`loraq demo {words}` must say {wanted!r}: {told.stderr}")
    print(f"bare: {len(plain)} examples and the commands ran with torch {torch.__version__}.")


if __name__ == "__main__":
    main()
