"""Fixtures for all tests: one thread, seeded randomness, every device that is there."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("loraq", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("loraq")


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
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine, the CPU first."""
    return torch.device(request.param)
