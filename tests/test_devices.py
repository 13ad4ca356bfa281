"""Names of devices: what they stand for, and what is refused before any work."""

import pytest
import torch

import loraq
from loraq import devices
from loraq.devices import find_device, find_device_to_run, find_devices, kind_of
from loraq.errors import DeviceError
from loraq.integrations.config import LoraqConfig


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two CUDA devices, as far as names go."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(devices, "_count", lambda kind: 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", ["cuda:0", "cuda:1"]),
        ("all", ["cuda:0", "cuda:1"]),
        ("cuda", ["cuda:0", "cuda:1"]),
        ("cuda:1", ["cuda:1"]),
        ("cpu", ["cpu"]),
        (torch.device("cuda:0"), ["cuda:0"]),
    ],
)
def test_a_name_stands_for_devices(two_gpus, name, expected):
    assert [str(device) for device in find_devices(name)] == expected
    if name != "all":
        assert str(find_device(name)) == expected[0]


def test_without_a_gpu_auto_is_the_cpu(no_gpu):
    assert find_devices("auto") == (torch.device("cpu"),)
    assert kind_of(find_device("auto")) == "cpu"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("all", r"every GPU, and there is none: torch .* finds no cuda device\. Use 'auto' or"),
        ("cuda", r"'cuda' cannot be used: torch .* no cuda device\. Use 'auto', which is 'cpu'"),
        ("cuda:1", "'cuda:1' cannot be used"),
        ("xpu", "finds no xpu device"),
        ("mps", "finds no mps device"),
        ("cudda", r"Unknown device 'cudda'\. Did you mean 'cuda'"),
        ("meta", "'meta' solves no layers"),
        ("cuda:x", "Unknown device"),
    ],
)
def test_what_is_not_there_is_refused(no_gpu, name, match):
    with pytest.raises(DeviceError, match=match):
        find_devices(name)


def test_a_number_that_is_too_large_is_refused_with_those_there_are(two_gpus):
    with pytest.raises(DeviceError, match="there is only cuda:0, cuda:1"):
        find_devices("cuda:7")


def test_a_kind_without_double_precision_is_refused_and_not_chosen(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise TypeError("no float64")

    monkeypatch.setattr(devices, "_count", lambda kind: int(kind == "mps"))
    monkeypatch.setattr(torch, "ones", fail)
    assert find_device("auto").type == "cpu"
    with pytest.raises(DeviceError, match=r"mps has no double precision.*no float64"):
        find_devices("mps")
    assert find_device_to_run("auto").type == "mps"  # running is another matter


def test_a_model_runs_on_more_kinds_than_layers_are_solved_on(two_gpus, monkeypatch):
    assert str(find_device_to_run("auto")) == "cuda:0"
    assert find_device_to_run("meta") == torch.device("meta")
    monkeypatch.setattr(devices, "_count", lambda kind: 0)
    with pytest.raises(DeviceError, match=r"'all', which cannot be used here.* is 'cpu' here"):
        find_device_to_run("all")


def test_one_device_is_not_all(two_gpus):
    with pytest.raises(DeviceError, match="runs on one device"):
        find_device("all")


def test_it_is_refused_before_anything_is_read(no_gpu, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(DeviceError):
        loraq.quantize_(model, "mxfp4-a16", device="cuda", progress=False)
    assert isinstance(model[0], torch.nn.Linear)
    with pytest.raises(DeviceError):
        loraq.quantize_checkpoint("nowhere", tmp_path / "out", "default", device="cuda")
    with pytest.raises(DeviceError):
        loraq.absorb_lora(model, "nothing", "nowhere", device="cuda")
    with pytest.raises(DeviceError):
        LoraqConfig(device="cuda")
    assert not list(tmp_path.iterdir())
