"""Fixtures for all tests: one thread, seeded randomness, every device that is there."""

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

#: Modules whose annotations are checked at every call in the tests: those of the mathematics that
#: state shapes. Not the layers and what they run (packed, transforms, kernels): torch.compile
#: traces them, and the check breaks the graph. Not what has to do with files and processes, whose
#: protocols and postponed imports cannot be checked at run time. And not the formats, where no
#: shape is written and the check is dear.
CHECKED = [
    "loraq.formats.powers",
    "loraq.linalg",
    "loraq.stats",
    "loraq.methods.base",
    "loraq.methods.expected",
    "loraq.methods.feedback",
    "loraq.methods.fits",
    "loraq.methods.inputs",
    "loraq.methods.prediction",
    "loraq.methods.qera",
    "loraq.methods.refit",
    "loraq.methods.smoothing",
    "loraq.pipeline.call_groups",
]
# Before anything of loraq is imported.
install_import_hook(CHECKED, "beartype.beartype")

from loraq.kernels.int8_matrix import saturates  # noqa: E402

torch.set_num_threads(1)

settings.register_profile("loraq", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("loraq")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that have slow tests, and skip what needs exact INT8 sums on a CPU without.

    A slow file that comes last has one process busy while the others have nothing to do.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if saturates(torch.device("cpu")):
        for item in items:
            if "int8_row" in item.nodeid or "every_back_end" in item.nodeid:
                item.add_marker(
                    pytest.mark.skip(
                        reason="INT8 sums overflow on this CPU, so int8_row refuses it"
                    )
                )


@pytest.fixture
def rng() -> torch.Generator:
    """A generator that is seeded anew for every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    not torch.cuda.is_available(), reason="no CUDA or ROCm device here"
                ),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine, the CPU first."""
    return torch.device(request.param)
