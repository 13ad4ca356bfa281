"""The shapes that jaxtyping states are checked while the tests run; see tests/conftest.py."""

from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import loraq
from conftest import CHECKED
from loraq.linalg import svd_of_product
from loraq.methods.prediction import tail_energies

SOURCE = Path(loraq.__file__).parent
#: What torch.compile traces, and what works on whole models and files.
UNCHECKED = {
    "appended.py",
    "nn.py",
    "packed.py",
    "transforms.py",
    "pipeline/module.py",
    "integrations/lora.py",
}


@pytest.mark.parametrize(
    "call",
    [
        lambda: tail_energies(torch.zeros(3)),
        lambda: tail_energies(torch.zeros(3, 4, dtype=torch.int32)),
        lambda: svd_of_product(torch.zeros(4, 2), torch.zeros(3, 5)),
        lambda: tail_energies([[1.0, 2.0]]),
    ],
    ids=["a vector", "integers", "ranks that differ", "a list"],
)
def test_a_wrong_shape_or_type_is_caught(call):
    with pytest.raises(TypeCheckError):
        call()


def test_every_file_of_the_mathematics_that_states_shapes_is_checked():
    stating = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    }
    stating = {path for path in stating if not path.startswith("evaluation/")} - UNCHECKED
    names = {"loraq." + path.removesuffix(".py").replace("/", ".") for path in stating}
    assert names == set(CHECKED)
