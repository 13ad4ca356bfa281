"""What this machine can do: devices, versions, back ends of the formats, a short self-test."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraq.advice import Advice, advice_on
from loraq.errors import KernelError, LoraqError
from loraq.formats import FORMATS
from loraq.kernels import BACKENDS, DEFAULT_BACKEND, resolve_backend
from loraq.kernels.base import Backend, LayerSpec
from loraq.kernels.dispatch import candidates, settle
from loraq.linalg import relative_error
from loraq.packed import LowRankBranch, PackedWeight
from loraq.recipe_names import parse_scheme
from loraq.scheme import Scheme
from loraq.transforms import rotate
from loraq.version import __version__

_PACKAGES = ("torch", "triton", "diffusers")
#: Layer and tokens of the self-test: PixArt's attention projection with 512 tokens.
_SHAPE, _TOKENS = (1152, 1152), 512
#: One scheme for each kind of activation, so that every back end has something to run.
_TESTED = (
    "mxfp4-a16+w8a8-r64",
    "mxfp4-amxfp8_e4m3+w8a8-r64",
    "int8-a8+int8-r64",
    "int4-a8+int8-r64",
    "int4-a8+w8a16-r62",
)


@dataclass(frozen=True)
class Choice:
    """The back end that layers of one kind use here."""

    #: Main format and activation format.
    weight: str
    activation: str
    backend: str
    #: Why not the ones that are tried before it; empty if it is the first.
    reason: str


@dataclass(frozen=True)
class Trial:
    """One back end in the self-test."""

    recipe: str
    backend: str
    #: ‖y − y_reference‖ / ‖y_reference‖, and what the back end promises; `None` if it failed.
    error: float | None
    bound: float
    #: Median time of a call, and how many times faster it is than bf16 `F.linear` without any
    #: quantization.
    milliseconds: float = 0.0
    speedup: float = 0.0
    #: The error that it ended with.
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the promise is kept."""
        return self.error is not None and self.error <= self.bound


@dataclass(frozen=True)
class Report:
    """Everything that `loraq doctor` prints."""

    versions: dict[str, str]
    devices: dict[str, str]
    choices: tuple[Choice, ...]
    trials: tuple[Trial, ...]
    #: What to quantize for the first GPU, or for the CPU where there is none.
    advice: Advice

    def tables(self) -> list[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
        """Return what to show: title, headings and rows of each table."""
        choices = [(c.weight, c.activation, c.backend, c.reason) for c in self.choices]
        trials = [
            (
                t.recipe,
                t.backend,
                "failed" if t.error is None else f"{t.error:.1e}",
                f"{t.bound:.0e}",
                f"{t.milliseconds:.1f}",
                f"{t.speedup:.2f}",
            )
            for t in self.trials
        ]
        one = self.advice
        size = f"{_SHAPE[0]}×{_SHAPE[1]}, {_TOKENS} tokens"
        title = f"Self-test: {size}, against the reference and bf16 F.linear"
        return [
            ("This machine", ("", ""), [*self.devices.items(), *self.versions.items()]),
            (
                "Back ends of the named formats",
                ("weight", "activation", "back end", "why"),
                choices,
            ),
            (title, ("recipe", "back end", "error", "bound", "ms", "times bf16"), trials),
            (
                "What suits this machine",
                ("device", "recipe", "back end", "why"),
                [(one.title, one.recipe, one.backend, one.why)],
            ),
        ]


def examine() -> Report:
    """Return the report for the first GPU, or for the CPU where there is none.

    Raises:
        KernelError: `LORAQ_BACKEND` names no back end.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Report(
        _versions(),
        _devices(),
        tuple(choices(device)),
        tuple(self_test(device)),
        advice_on(device),
    )


def choices(device: torch.device) -> list[Choice]:
    """Return the back end of every named main format with 4-, 8- and 16-bit activations."""
    asked, found = resolve_backend(DEFAULT_BACKEND), {}
    for name in (fmt.name for fmt in FORMATS.values() if fmt.bits <= 8):
        for width in (4, 8, 16):
            scheme = parse_scheme(f"{name}-a{width}")
            found[scheme] = _choice(asked, scheme, device)
    return list(found.values())


def _choice(asked: str, scheme: Scheme, device: torch.device) -> Choice:
    reasons: list[str] = []
    for backend in candidates(asked, device, strict=False):
        run, reason = settle(backend, LayerSpec((scheme,), _SHAPE, device))
        if run is not None:
            if run.is_weight_only and not scheme.is_weight_only:
                reasons.append("activations run in 16 bits")
            return Choice(scheme.weight, scheme.activation, backend.name, "; ".join(reasons))
        reasons.append(f"not {backend.name}: {reason}")
    return Choice(scheme.weight, scheme.activation, "none", "; ".join(reasons))


def self_test(device: torch.device) -> list[Trial]:
    """Run a layer on every back end that takes it, against the reference and bf16 `F.linear`."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn((_TOKENS, _SHAPE[1]), generator=random, device="cpu").bfloat16().to(device)
    w = torch.randn(_SHAPE, generator=random, device="cpu") / _SHAPE[1] ** 0.5
    trials = []
    for recipe in _TESTED:
        scheme = parse_scheme(recipe)
        packed = _random_layer(w, scheme, random).to(device)
        for backend in BACKENDS.values():
            run, _ = settle(backend, LayerSpec((scheme,), _SHAPE, device))
            if backend.name == "reference" or run is None:
                continue
            try:
                trials.append(_try_backend(recipe, backend, packed, run, (x, w.to(x))))
            except KernelError:  # it refuses when it sees the values, as it should
                continue
            except Exception as error:  # a build of torch that lacks something: the others go on
                failure = f"{type(error).__name__}: {error}"
                bound = backend.bound(run, x.dtype)
                trials.append(Trial(recipe, backend.name, None, bound, failure=failure))
    return trials


def _random_layer(w: Tensor, scheme: Scheme, random: torch.Generator) -> PackedWeight:
    """Round a weight to nearest, beside a small random branch: only its arithmetic matters."""
    branch = None
    if scheme.branch is not None:
        shapes = (_SHAPE[0], scheme.branch.rank), (scheme.branch.rank, _SHAPE[1])
        up, down = (
            scheme.branch.weight_format.quantize(
                0.03 * torch.randn(shape, generator=random, device="cpu")
            )
            for shape in shapes
        )
        branch = LowRankBranch(proj_up=up, proj_down=down)
    return PackedWeight(scheme, scheme.weight_format.quantize(w), branch)


def _try_backend(
    recipe: str,
    backend: Backend,
    packed: PackedWeight,
    scheme: Scheme,
    given: tuple[Tensor, Tensor],
) -> Trial:
    (x, dense), reference = given, BACKENDS["reference"]
    x = rotate(x, scheme.rotation)
    expected = reference.linear(x, reference.prepare(packed, scheme, x.dtype), scheme, None)
    operands = backend.prepare(packed, scheme, x.dtype)
    y = backend.linear(x, operands, scheme, None).double()
    error = relative_error(expected.double(), y)
    ours, plain = [], []
    for _ in range(3):  # in turn, so that both see the same machine
        plain.append(_seconds(lambda: linear(x, dense)))
        ours.append(_seconds(lambda: backend.linear(x, operands, scheme, None)))
    seconds = statistics.median(ours)
    bound = backend.bound(scheme, x.dtype)
    return Trial(
        recipe, backend.name, error, bound, 1e3 * seconds, statistics.median(plain) / seconds
    )


def _seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _versions() -> dict[str, str]:
    versions = {"loraq": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _devices() -> dict[str, str]:
    devices = {
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    }
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    return devices


def require_healthy(report: Report) -> None:
    """Raise `LoraqError` that names the back ends which broke their promise."""
    broken = [
        f"'{t.backend}' on '{t.recipe}' ({t.failure or f'{t.error:.2g} > {t.bound:.2g}'})"
        for t in report.trials
        if not t.passed
    ]
    if broken:
        raise LoraqError(
            f"The self-test failed for {', '.join(broken)}. Use the back end 'reference' "
            "(LORAQ_BACKEND=reference) and report the output of `loraq doctor --json`."
        )
