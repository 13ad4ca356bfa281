"""torchmetrics and torch-fidelity, imported where they can be: without torchvision too.

torch-fidelity imports torchvision for networks that are not used here, and torchmetrics imports
torch-fidelity where it finds it. torchvision in turn must be built for the very torch that is there
(its wheels are for CUDA), or nothing that imports it can be imported.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from typing import Any

from loraq.errors import MissingLibraryError


def torchmetrics() -> Any:
    """Return torchmetrics.

    Raises:
        MissingLibraryError: it is not installed.
    """
    try:
        with _without_torchvision():
            import torchmetrics.functional.image
            import torchmetrics.functional.image.lpips
            import torchmetrics.functional.multimodal.clip_score
            import torchmetrics.image.fid
    except ImportError as error:
        raise MissingLibraryError(
            "SSIM, LPIPS, CLIP score and the Fréchet distance come with torchmetrics, which "
            f'cannot be imported ({error}). Install it with `pip install "loraq[evaluate]"`.'
        ) from error
    return torchmetrics


def inception_class() -> Any:
    """Return torch-fidelity's Inception.

    Raises:
        MissingLibraryError: torch-fidelity is not installed.
    """
    try:
        with _without_torchvision():
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingLibraryError(
            f"The Inception of FID comes with torch-fidelity, which cannot be imported ({error}). "
            "Install it with `pip install --no-deps torch-fidelity`, which leaves torchvision out."
        ) from error
    return FeatureExtractorInceptionV3


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """Let modules of torch-fidelity be imported without its `__init__`, which wants torchvision."""
    spec = find_spec("torch_fidelity") if "torch_fidelity" not in sys.modules else None
    if spec is None or _has_torchvision():
        yield
        return
    sys.modules["torch_fidelity"] = module_from_spec(spec)  # a place for modules; nothing has run
    try:
        yield
    finally:
        del sys.modules["torch_fidelity"]


def _has_torchvision() -> bool:
    try:
        import torchvision  # noqa: F401 (whether it can be imported is the question)
    except Exception:  # built for another torch, it fails in ways of its own
        return False
    return True
