"""Where Triton's kernels run: asked without importing Triton, which takes a second."""

import os
from importlib.util import find_spec

import torch


def absence(device: torch.device) -> str | None:
    """Return why no kernel can be launched on a device, or `None`."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "Triton compiles for GPUs; on a CPU it needs its interpreter (TRITON_INTERPRET=1), "
            "which is for tests"
        )
    if find_spec("triton") is None:
        return 'triton is not installed (pip install "loraq[triton]")'
    return None
