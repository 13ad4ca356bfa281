"""Where layers are solved, and run: names of devices, and the devices that they stand for here."""

from typing import Any

import torch

from loraq.errors import DeviceError, unknown

#: Names that stand for no kind of device: the best one there is, and one worker for each GPU.
AUTO, ALL = "auto", "all"
#: Kinds of devices, in the order in which `AUTO` looks for them; the CPU is always there.
_KINDS = ("cuda", "xpu", "mps", "cpu")


def find_devices(name: str | torch.device) -> tuple[torch.device, ...]:
    """Return the devices that a name stands for; several workers take turns on them.

    Args:
        name: "auto" (every accelerator of the first kind there is, else the CPU), "all" (the same,
            but never the CPU), a kind such as "cpu", "cuda" or "xpu", or one device such as
            "cuda:1".

    Raises:
        DeviceError: it names no device, or one that is not here or cannot be used.
    """
    if str(name) in (AUTO, ALL):
        found = next(kind for kind in _KINDS if kind == "cpu" or _refuse(kind) is None)
        if found == "cpu" and name == ALL:
            raise DeviceError(
                f"Device 'all' is every GPU, and there is none: {_refuse('cuda')}. Use 'auto' or "
                "'cpu', with several workers (`--workers`) for several cores."
            )
        return _list(found)
    try:
        asked = torch.device(name)
    except (RuntimeError, TypeError):
        raise DeviceError(unknown("device", name, (AUTO, ALL, *_KINDS, "cuda:1"))) from None
    if asked.type not in _KINDS:
        raise DeviceError(
            f"Device '{name}' solves no layers. Known: {', '.join((AUTO, ALL, *_KINDS))}."
        )
    reason = _refuse(asked.type)
    if reason is None and asked.index is not None and asked not in _list(asked.type):
        there = ", ".join(map(str, _list(asked.type)))
        reason = f"there is only {there}"
    if reason is not None:
        raise DeviceError(
            f"Device '{name}' cannot be used: {reason}. Use 'auto', which is "
            f"'{find_devices(AUTO)[0]}' here."
        )
    return _list(asked.type) if asked.index is None else (asked,)


def find_device(name: str | torch.device) -> torch.device:
    """Return the one device that a name stands for, the first of its kind.

    Raises:
        DeviceError: as `find_devices`, or it stands for all.
    """
    if name == ALL:
        raise DeviceError(
            "Device 'all' is for quantizing a whole model; this runs on one device. Name it, such "
            "as 'cuda:0', or use 'auto'."
        )
    return find_devices(name)[0]


def find_device_to_run(name: str | torch.device) -> torch.device:
    """Return the one device that a name stands for where a model runs, which takes less.

    It may be of any kind that torch knows; "auto" takes MPS too, which solves no layers.

    Raises:
        DeviceError: it is not here, or stands for all.
    """
    if name == AUTO:
        best = find_device(AUTO)
        return torch.device("mps") if best.type == "cpu" and _count("mps") else best
    try:
        torch.empty(1, device=name)
    # What a build without the device raises.
    except (ImportError, RuntimeError, AssertionError) as error:
        raise DeviceError(
            f"device is {str(name)!r}, which cannot be used here: {error}. Use 'auto', which is "
            f"'{find_device_to_run(AUTO)}' here; `loraq doctor` lists the devices."
        ) from error
    return torch.device(name)


def kind_of(device: torch.device) -> str:
    """Return the kind of a device; two kinds give two different sums."""
    return "rocm" if device.type == "cuda" and torch.version.hip else device.type


def describe_devices(devices: tuple[torch.device, ...]) -> str:
    """Return what the accelerators among devices are called by their makers, "" without any."""
    modules: dict[str, Any] = {"cuda": torch.cuda, "xpu": torch.xpu}
    names = {modules[d.type].get_device_name(d) for d in devices if d.type in modules}
    return ", ".join(sorted(names))


def _list(kind: str) -> tuple[torch.device, ...]:
    """Return the devices of a kind that is here."""
    if kind == "cpu":
        return (torch.device(kind),)
    return tuple(torch.device(kind, index) for index in range(_count(kind)))


def _count(kind: str) -> int:
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    count: int = torch.cuda.device_count() if kind == "cuda" else torch.xpu.device_count()
    return count


def _refuse(kind: str) -> str | None:
    """Return why layers cannot be solved on devices of a kind, or `None`."""
    if kind == "cpu":
        return None
    if not _count(kind):
        return f"torch {torch.__version__} finds no {kind} device"
    try:
        torch.ones(1, dtype=torch.float64, device=kind).add_(1)
    except Exception as error:  # backends raise what they like
        return (
            f"{kind} has no double precision, in which the solver sums and inverts ({error}), or "
            "does not work"
        )
    return None
