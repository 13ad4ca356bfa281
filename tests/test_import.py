"""Importing is light: what is not needed yet is not loaded."""

import subprocess
import sys

import pytest

HEAVY = [
    "torch",
    "safetensors",
    "diffusers",
    "transformers",
    "accelerate",
    "triton",
    "matplotlib",
    "sklearn",
    "rich",
]
INTEGRATED = ["diffusers", "transformers", "accelerate", "triton", "matplotlib", "sklearn"]


def loaded_after(statement: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after a statement."""
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert finished.stderr == ""
    return set(finished.stdout.split())


@pytest.mark.parametrize(
    "statement",
    ["import loraq", "import loraq; dir(loraq); loraq.__version__", "import loraq.errors"],
)
def test_importing_the_package_loads_nothing_heavy(statement):
    assert loaded_after(statement).isdisjoint(HEAVY)


def test_public_names_load_neither_diffusers_nor_triton():
    loaded = loaded_after("from loraq import QuantizedLinear, load, quantize_")
    assert "torch" in loaded
    assert loaded.isdisjoint(INTEGRATED)


def test_running_a_checkpoint_loads_no_solver():
    loaded = loaded_after("from loraq import QuantizedLinear, load_into, save, set_backend")
    assert "loraq.checkpoint" in loaded
    assert not [
        name
        for name in loaded
        if name.startswith(("loraq.methods", "loraq.recipe", "loraq.families", "loraq.pipeline"))
    ]
