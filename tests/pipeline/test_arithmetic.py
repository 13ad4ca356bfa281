"""What a process has set for its own work changes no byte, and stays as it was."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors.torch import save_file

import loraq
from loraq import transforms
from loraq.formats import element, scales
from loraq.kernels import low_memory
from loraq.pipeline.arithmetic import fixed_arithmetic
from loraq.recipe import Recipe
from loraq.stats import ActivationStats
from tests.folders import files_of

CPU = torch.device("cpu")


@contextmanager
def set_by(change: Callable[[object], None], now: object, before: object) -> Iterator[None]:
    change(now)
    try:
        yield
    finally:
        change(before)


def set_product(precision: object) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision


SETTINGS = {
    "bf16 products": lambda: set_by(torch.set_float32_matmul_precision, "medium", "highest"),
    "tf32 products": lambda: set_by(torch.set_float32_matmul_precision, "high", "highest"),
    "fp64 by default": lambda: set_by(torch.set_default_dtype, torch.float64, torch.float32),
    "bf16 by default": lambda: set_by(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another device by default": lambda: torch.device("meta"),
    "two threads": lambda: set_by(torch.set_num_threads, 2, torch.get_num_threads()),
}


def state() -> tuple[object, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
    )


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    made = torch.randn(288, 416, generator=torch.Generator().manual_seed(0))
    made[:, 5] *= 20
    return made


def packed(weight: torch.Tensor, method: str, name: str) -> list[torch.Tensor]:
    weight = weight[:96, :160] if method == "loraq" else weight  # the others are fast
    recipe = Recipe.from_dict(
        Recipe.named(name).to_dict()
        | {"method": method, "effort": "fast" if method == "loraq" else "default"}
    )
    return list(loraq.quantize_weight(weight, recipe).packed.tensors.values())


METHODS = {"loraq": "mxfp4+w8a8-r8", "svdquant": "mxfp4-a16+bf16-r8", "lqer": "mxfp4+w8a8-r8"}


@pytest.mark.parametrize("method", METHODS)
def test_no_setting_of_the_process_changes_a_byte(weight, method):
    wanted = packed(weight, method, METHODS[method])
    for name, setting in SETTINGS.items():
        with setting():
            before = state()
            found = packed(weight, method, METHODS[method])
            assert state() == before, name
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True)), name


def test_files_do_not_depend_on_the_default_device(weight, tmp_path):
    save_file({"0.weight": weight}, tmp_path / "model.safetensors")
    for name, default in (("a", "cpu"), ("b", "meta")):
        with torch.device(default):
            loraq.quantize_checkpoint(
                tmp_path / "model.safetensors", tmp_path / name, "mxfp4-a16", progress=False
            )
            loraq.save_stats(
                {"0": ActivationStats(3, torch.eye(4, device="cpu"))},
                tmp_path / f"{name}.safetensors",
            )
            assert loraq.load_stats(tmp_path / f"{name}.safetensors")["0"].tokens == 3
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("second_moment", [True, False])
def test_statistics_do_not_depend_on_what_is_made_by_default(second_moment):
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))

    def collect() -> ActivationStats:
        return loraq.collect_stats(
            model, lambda: model(inputs), ["0"], second_moment=second_moment
        )["0"]

    wanted = collect()
    for name in ("fp64 by default", "bf16 by default", "another device by default"):
        with SETTINGS[name]():
            assert collect().sha256 == wanted.sha256, name


def test_a_shared_budget_does_not_depend_on_them_either():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 96))
    recipe = Recipe.from_dict(
        Recipe.named("mxfp4+w8a8").to_dict() | {"budget": "r16=5", "allocation": "greedy"}
    )
    wanted = loraq.plan_model(model, recipe, progress=False)
    for name, setting in SETTINGS.items():
        with setting():
            assert loraq.plan_model(model, recipe, progress=False) == wanted, name


def test_the_newer_setting_of_one_library_is_put_back():
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("this torch has only the older setting")
    before = torch.backends.mkldnn.matmul.fp32_precision
    with set_by(set_product, "bf16", before):
        with fixed_arithmetic(CPU):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_threads_put_back_what_was_there_when_the_last_one_goes():
    inside, left = Barrier(2), Barrier(2)

    def work(i: int) -> torch.dtype:
        with fixed_arithmetic(CPU):
            inside.wait(10)
            if i:
                left.wait(10)
                return torch.get_default_dtype()  # the other one has gone
        left.wait(10)
        return torch.float32

    with set_by(torch.set_default_dtype, torch.float64, torch.float32):
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(work, range(2))) == [torch.float32] * 2
        assert torch.get_default_dtype() == torch.float64


def test_the_smallest_numbers_count_whatever_the_process_has_set():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        with fixed_arithmetic(torch.device("cpu")):
            assert (torch.tensor([3e-39]) * 0.5).item() > 0
        assert (torch.tensor([3e-39]) * 0.5).item() == 0  # as it was
    finally:
        torch.set_flush_denormal(False)


def forget_tables() -> None:
    """Drop what earlier calls have kept, which would hide what a setting changes."""
    tables = element._decode_table, scales._powers_of_two, low_memory._table
    for cached in (*tables, transforms.signed_hadamard):
        cached.cache_clear()


@pytest.mark.parametrize("backend", ["auto", "reference", "resident", "low_memory", "int8_row"])
def test_no_setting_changes_what_is_saved_loaded_and_computed(backend, tmp_path):
    name = "int8-a8+int8-r8-h32" if backend == "int8_row" else "mxfp4-a8+w8a8-r8-h32"
    recipe = replace(Recipe.named(name), effort="fast")
    torch.manual_seed(0)
    source = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64))
    x = torch.randn(5, 64)

    def outputs(folder: Path) -> list[torch.Tensor]:
        model = copy.deepcopy(source)
        loraq.quantize_(model, recipe, progress=False)
        loraq.save(model, folder)
        forget_tables()
        again = copy.deepcopy(source)
        loraq.load_into(again, folder, backend=backend)
        forget_tables()
        with torch.no_grad():
            return [again(x), *again.state_dict().values()]

    wanted = outputs(tmp_path / "wanted")
    # The others are asked of the products themselves, of this model as of a float one.
    settings = {name: SETTINGS[name] for name in SETTINGS if "by default" in name}
    settings["deterministic"] = lambda: set_by(deterministic, True, False)
    for setting_name, setting in settings.items():
        with setting():
            found = outputs(tmp_path / setting_name)
        assert all(map(torch.equal, wanted, found)), setting_name


def deterministic(on: bool) -> None:
    torch.use_deterministic_algorithms(on)
