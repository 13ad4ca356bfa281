"""What of a machine decides the bytes of a solution, in words that a person understands.

Sums of floats depend on their order, and the order on the instructions that a library picks: at
another instruction set a solver gives other bytes, as good as the first ones. So a run goes on only
where these facts are the same. The number of threads, workers and devices is not among them: every
layer is solved on one thread, or on one device.
"""

import os
import platform
import re
from pathlib import Path

import torch

from loraq.devices import describe_devices, kind_of

#: Settings from outside that make the libraries pick other instructions or another order.
_SETTINGS = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_DEBUG_CPU_TYPE",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "BLIS_ARCH_TYPE",
)
#: Lines of `torch.__config__.show()` that name a library which computes.
_LIBRARIES = re.compile(r"Math Kernel Library Version (\S+)|(MKL-DNN v\S+)")
#: Lines of `/proc/cpuinfo` on x86 and on ARM.
_FACTS = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")


def describe_machine(devices: tuple[torch.device, ...]) -> dict[str, str]:
    """Return what decides bytes besides the source and the recipe, by topic.

    Worker processes inherit all of it.

    Args:
        devices: where layers are solved, all of one kind.
    """
    built = torch.__config__.show()
    libraries = [f"MKL {mkl}" if mkl else dnn for mkl, dnn in _LIBRARIES.findall(built)]
    if found := re.search(r"BLAS_INFO=(\w+)", built):
        libraries.append(f"BLAS {found[1]}")
    settings = [f"{name}={os.environ[name]}" for name in _SETTINGS if os.environ.get(name)]
    accelerators = describe_devices(devices)
    return {
        "device": kind_of(devices[0]),
        **({"accelerators": accelerators} if accelerators else {}),
        "processor": _describe_processor(),
        # What torch's own kernels use; honours ATEN_CPU_CAPABILITY.
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "libraries": ", ".join(libraries),
        "settings": ", ".join(settings),
    }


def _describe_processor() -> str:
    """Return architecture, maker and model: the libraries pick their code by these."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}".strip()
    first: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    facts = (f"{key} {first[key]}" for key in _FACTS if key in first)
    return ", ".join([platform.machine(), *facts])
