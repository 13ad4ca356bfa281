"""What suits which device: the table, its order, and that what it names exists."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loraq.advice import Advice, advice_for, advice_on, advices
from loraq.errors import LoraqError
from loraq.kernels import BACKENDS, LayerSpec, dispatch
from loraq.kernels.dispatch import settle
from loraq.recipe_names import parse_scheme

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CUDA = torch.device("cuda", 0)

each_device = pytest.mark.parametrize("advice", advices().values(), ids=advices())


@each_device
def test_the_back_end_takes_the_recipe_on_the_device(advice: Advice, monkeypatch):
    scheme = parse_scheme(f"{advice.recipe}-r32" if "+" in advice.recipe else advice.recipe)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: advice.least)
    monkeypatch.setattr("loraq.kernels.int8_row.saturates", lambda device: not advice.int8)
    device = CUDA if advice.kind == "cuda" else torch.device("cpu")
    if advice.kind == "cuda":
        monkeypatch.setattr("loraq.kernels.int8_row.saturates", lambda device: False)
    if advice.backend != "auto":
        spec = LayerSpec((scheme,), (1152, 4608), device)
        assert settle(BACKENDS[advice.backend], spec) == (scheme, "")
    assert advice.sentence.endswith(".")
    assert advice_for(advice.device) == advice


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((12, 0), "blackwell"),
        ((10, 3), "blackwell"),
        ((9, 0), "hopper"),
        ((8, 9), "ada"),
        ((8, 6), "ampere"),
        ((7, 5), "ampere"),
        ((7, 0), "cuda"),
    ],
)
def test_an_nvidia_gpu_is_told_by_its_capability(capability, name, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert advice_on(CUDA).device == name


@pytest.mark.parametrize(
    ("arch", "name"), [("gfx950:sramecc+:xnack-", "gfx950"), ("gfx942", "hip")]
)
def test_an_amd_gpu_is_told_by_its_architecture(arch, name, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=arch)
    )
    assert advice_on(CUDA).device == name


@pytest.mark.parametrize(("overflows", "name"), [(False, "cpu"), (True, "cpu-before-vnni")])
def test_a_cpu_is_told_by_its_int8_sums(overflows, name, monkeypatch):
    monkeypatch.setattr("loraq.advice.saturates", lambda device: overflows)
    assert advice_on(torch.device("cpu")).device == name


def test_other_devices_have_an_entry_and_unknown_names_are_an_error():
    assert advice_on(torch.device("mps")).device == "mps"
    assert advice_on(torch.device("xpu")).device == "xpu"
    assert advice_for("here").kind in ("cpu", "cuda", "hip")
    with pytest.raises(LoraqError, match=r"Unknown device 'hoper'.*'hopper'"):
        advice_for("hoper")


@pytest.mark.skipif(not RESULTS.is_dir(), reason="result files are only in a clone")
def test_the_automatic_choice_takes_only_what_was_measured_on_such_a_device():
    for device, backends in dispatch._AUTOMATIC.items():
        if [backend.name for backend in backends] != ["low_memory"]:
            assert list((RESULTS / device).glob("*.json")), device
