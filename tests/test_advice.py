"""What suits which device: the table, its order, and that what it names exists."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraq.advice import Advice, advice_for, advice_on, advices
from loraq.errors import LoraqError
from loraq.kernels import BACKENDS, LayerSpec, dispatch
from loraq.kernels.base import Backend
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


def wrong_rows(backend: Backend, device: str, records: list[dict[str, Any]]) -> list[str]:
    """Return what keeps a back end out of the automatic list of a device, by result files.

    Of each such machine the newest rows count. They hold the back end if it takes their recipe as
    the list asks it to, and `low_memory` of the same layer and tokens beside it.
    """
    from benchmarks.speed.layer import CONTENDERS
    from benchmarks.speed.machines import named, newest

    schemes = {
        label: parse_scheme(recipe) for label, recipe, name in CONTENDERS if name == backend.name
    }
    wrong, n_rows = [], 0
    for machine, by_model in newest(records, "speed.layer", "model").items():
        rows = [row for record in by_model.values() for row in record["rows"]]
        times = {
            (row["model"], row["layer"], row["tokens"]): row["times_bf16"]
            for row in rows
            if row["contender"] == "low_memory a16"
        }
        for row in rows if machine.device == device else []:
            place = (row["model"], row["layer"], row["tokens"])
            scheme = schemes.get(row["contender"])
            shape = (int(row["n_out"]), int(row["n_in"]))
            if scheme is None or place not in times:
                continue
            if backend.refusal(scheme, shape, torch.device(device)) is not None:
                continue
            n_rows += 1
            if row["times_bf16"] <= times[place]:
                wrong.append(f"{named(machine)}, {place}: no faster than low_memory")
            if row["error"] > backend.bound(scheme, torch.bfloat16):
                wrong.append(f"{named(machine)}, {place}: over its bound")
    return wrong if n_rows else ["no rows of it beside low_memory"]


@pytest.mark.skipif(not RESULTS.is_dir(), reason="result files are only in a clone")
def test_the_automatic_choice_takes_only_what_was_measured_faster_and_within_its_bound(monkeypatch):
    from benchmarks.results import read

    monkeypatch.setattr("loraq.kernels.int8_row.saturates", lambda device: False)
    records = read(RESULTS)
    for device, backends in dispatch._AUTOMATIC.items():
        assert backends[-1].name == "low_memory"
        for backend in backends[:-1]:
            assert wrong_rows(backend, device, records) == [], (device, backend.name)


@pytest.mark.skipif(not RESULTS.is_dir(), reason="result files are only in a clone")
@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, ""),
        ({"times_bf16": 0.8}, "no faster than low_memory"),
        ({"error": 0.021}, "over its bound"),
        ({"contender": "int8_row"}, "no rows of it"),  # INT4, which it would encode anew
        ({"tokens": 256}, "no rows of it"),
    ],
)
def test_a_back_end_is_kept_out_by_planted_rows(changes, wrong, monkeypatch):
    monkeypatch.setattr("loraq.kernels.int8_row.saturates", lambda device: False)
    (backend, _) = dispatch._AUTOMATIC["cpu"]
    shape = {"model": "flux", "layer": "ff", "n_in": "3072", "n_out": "3072", "tokens": 1024}
    decoded = {**shape, "contender": "low_memory a16", "times_bf16": 0.8, "error": 0.001}
    ours = {**shape, "contender": "int8", "times_bf16": 1.5, "error": 0.003, **changes}
    record = {"benchmark": "speed.layer", "device": "cpu", "machine": "x86_64", "commit": "a"}
    found = wrong_rows(backend, "cpu", [{**record, "threads": 2, "rows": [decoded, ours]}])
    assert [text for text in found if wrong not in text] == []
    assert bool(found) == bool(wrong)
    assert wrong_rows(backend, "cuda", [{**record, "threads": 2, "rows": [decoded, ours]}])
