"""Which recipe suits a device, on which back end: one table of data, `data/devices.toml`."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch

from loraq.errors import LoraqError, unknown
from loraq.kernels.int8_matrix import saturates

#: What the device of this machine is called.
HERE = "here"


@dataclass(frozen=True)
class Advice:
    """What to quantize for a kind of device, and how to run it."""

    #: Short name, for `loraq plan --for`.
    device: str
    title: str
    recipe: str
    #: "auto", or a name that has to be asked for.
    backend: str
    why: str
    #: The device's conditions: "cuda", "hip", "xpu", "mps" or "cpu"; the smallest compute
    #: capability; the architecture; whether sums of INT8 products must be exact.
    kind: str
    least: tuple[int, int] = (0, 0)
    arch: str = ""
    int8: bool = False

    @property
    def sentence(self) -> str:
        """What to do, and why."""
        run = "" if self.backend == "auto" else f", run with backend='{self.backend}'"
        return f"{self.title}: recipe '{self.recipe}'{run}, because {self.why}."


@cache
def advices() -> dict[str, Advice]:
    """Return the table, by short names; of a device's entries the first counts."""
    text = files("loraq").joinpath("data/devices.toml").read_text(encoding="utf-8")
    return {
        name: Advice(device=name, **{**row, "least": tuple(row.get("least", (0, 0)))})
        for name, row in tomllib.loads(text).items()
    }


def advice_for(name: str) -> Advice:
    """Return what suits a device.

    Args:
        name: a short name of the table; "here" for the first GPU of this machine, or its CPU.

    Raises:
        LoraqError: there is no such name.
    """
    if name == HERE:
        return advice_on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if name not in advices():
        raise LoraqError(unknown("device", name, [*advices(), HERE]))
    return advices()[name]


def advice_on(device: torch.device) -> Advice:
    """Return what suits a device of this machine."""
    kind, capability, arch = device.type, (0, 0), ""
    if kind == "cuda" and torch.version.hip is not None:
        kind, arch = "hip", torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    elif kind == "cuda":
        capability = torch.cuda.get_device_capability(device)
    return next(
        one
        for one in advices().values()
        if one.kind == kind
        and capability >= one.least
        and one.arch in ("", arch)
        and not (one.int8 and saturates(device))
    )
