"""`quantize_weight` and `quantize_`: the same bytes whoever does
the work, and nothing lost on a bad day.
"""

import copy
import hashlib
import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from small.pixart import small_pixart
from torch import Tensor, nn

from benchmarks.worlds.matrices import dit_like, gaussian
from loraq.errors import FormatError, LayerError, RecipeError, SchemeError
from loraq.layers import linear_layers, quantized_layers
from loraq.methods import RTN
from loraq.nn import QuantizedLinear
from loraq.packed import LayerSolution
from loraq.pipeline.module import plan_model, quantize_, quantize_weight
from loraq.recipe import Recipe
from loraq.rules import Rule
from loraq.scheme import Branch, Scheme

#: Wide enough for the randomized start of the solver, and short.
FAST = Recipe(Scheme("mxfp4", "mxfp4", Branch(8, "mxint8", "mxint8")), effort="fast", keep="float")
NAMES = [
    "blocks.0.attn",
    "blocks.0.up",
    "blocks.0.down",
    "blocks.1.attn",
    "blocks.1.up",
    "blocks.1.down",
]


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.attn = nn.Linear(96, 96)
        self.up = nn.Linear(96, 128)
        self.down = nn.Linear(128, 96, bias=False)
        for i, layer in enumerate((self.attn, self.up, self.down)):
            layer.weight.data = dit_like(*layer.weight.shape, seed=10 * seed + i)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x + self.attn(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Linear(16, 96)
        self.blocks = nn.ModuleList([Block(0), Block(1)])
        self.proj_out = nn.Linear(96, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedder(x)
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """The state of the model after one undisturbed run."""
    torch.manual_seed(0)
    model = Model()
    quantize_(model, FAST, progress=False)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def assert_same_solution(solution: LayerSolution, layer: QuantizedLinear) -> None:
    other = QuantizedLinear.from_packed(solution.packed)
    for name, tensor in other.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name
    assert layer.scheme == solution.packed.scheme


# --- a module in place ----------------------------------------------------------------------------


def test_the_linear_layers_are_replaced_in_place_and_the_skipped_ones_stay(model):
    before = dict(model.named_modules())
    float_layers = linear_layers(model)
    report = quantize_(model, FAST, progress=False)
    assert list(quantized_layers(model)) == [layer.name for layer in report.layers] == NAMES
    assert list(linear_layers(model)) == ["embedder", "proj_out"]
    for name in ("embedder", "proj_out", "blocks", "blocks.0"):
        assert model.get_submodule(name) is before[name]
    for name, layer in quantized_layers(model).items():
        assert layer.bias is float_layers[name].bias
        assert (layer.out_features, layer.in_features) == float_layers[name].weight.shape
        assert layer.training


def test_the_model_computes_nearly_what_it_did(model):
    x = gaussian(12, 16)
    exact = model(x)
    quantize_(model, "mxint8-a16", progress=False)
    assert (model(x) - exact).norm() < 0.02 * exact.norm()
    assert not any(type(layer) is nn.Linear for layer in model.blocks.modules())


def test_the_rules_of_the_recipe_decide(model):
    rules = (
        Rule("proj_out", skip=False, branch={"rank": 4}),
        Rule("*.up", weight="mxint4", activation="bf16"),
        Rule("blocks.1.*", skip=True),
    )
    quantize_(model, replace(FAST, rules=rules), progress=False)
    layers = quantized_layers(model)
    assert list(layers) == [
        "blocks.0.attn",
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1.up",
        "proj_out",
    ]
    assert layers["proj_out"].scheme.branch.rank == 4
    assert {layers[name].scheme.weight for name in ("blocks.0.up", "blocks.1.up")} == {"mxint4"}
    assert layers["blocks.0.attn"].scheme == FAST.scheme


def test_a_shared_layer_is_solved_once_and_replaced_everywhere():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(32, 32)), "c": shared})
    report = quantize_(model, "mxfp4", progress=False)
    assert [layer.name for layer in report.layers] == ["a", "b.1"]
    assert model["a"] is model["b"][0] is model["c"]
    assert isinstance(model["a"], QuantizedLinear)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_weights_of_any_float_dtype(dtype):
    model = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    weight, bias = model[0].weight, model[0].bias
    report = quantize_(model, "mxint4-a16", progress=False)
    assert model[0].bias is bias
    assert report.layers[0].relative_error < 0.15
    exact = nn.functional.linear(torch.ones(2, 64), weight.float(), bias.float())
    torch.testing.assert_close(
        model(torch.ones(2, 64, dtype=dtype)).float(), exact, atol=0.2, rtol=0.1
    )


def test_a_pixart_transformer_is_quantized_and_runs():
    pytest.importorskip("diffusers")
    model = small_pixart(
        torch.float32, sample_size=8, in_channels=4, out_channels=8, caption_channels=24
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 3, 24),
        "timestep": torch.tensor([1, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    with torch.no_grad():
        exact = model(**inputs).sample
        recipe = Recipe.named("mxint8-a16+w8a8-r4").adjusted(keep="float")
        report = quantize_(model, recipe, progress=False)
        y = model(**inputs).sample
    parts = [f"attn1.to_{part}" for part in ("q", "k", "v", "out.0")] + [
        "attn2.to_q",
        "attn2.to_out.0",
    ]
    parts += ["ff.net.0.proj", "ff.net.2"]
    assert [layer.name for layer in report.layers] == [
        f"transformer_blocks.{i}.{p}" for i in range(2) for p in parts
    ]
    assert y.shape == exact.shape
    assert 0 < (y - exact).norm() < 0.02 * exact.norm()


# --- the report -----------------------------------------------------------------------------------


def test_the_report_says_what_the_layers_are(model):
    weights = {name: layer.weight.detach().clone() for name, layer in linear_layers(model).items()}
    plan = plan_model(model, FAST)
    report = quantize_(model, FAST, progress=False)
    assert report.recipe == FAST
    assert report.plan == plan
    for line, planned in zip(report.layers, plan.quantized, strict=True):
        layer, weight = model.get_submodule(line.name), weights[line.name]
        assert (line.name, line.shape, line.scheme, line.nbytes) == (
            planned.name,
            tuple(weight.shape),
            planned.scheme,
            planned.nbytes,
        )
        assert line.scheme == layer.scheme
        assert line.nbytes == layer.nbytes
        assert line.bits_per_weight == layer.bits_per_weight
        error = ((weight - layer.reconstruct()).norm() / weight.norm()).item()
        assert line.relative_error == pytest.approx(error, rel=1e-4)
        assert line.sqnr_db == pytest.approx(-20 * math.log10(error), abs=1e-3)
        assert line.seconds > 0
        assert line.source_sha256 == hashlib.sha256(weight.numpy().tobytes()).hexdigest()
        assert layer.record.items() >= line.record().items()
    errors = [line.relative_error for line in report.layers]
    assert report.mean_relative_error == pytest.approx(sum(errors) / 6)


def test_the_source_hash_is_of_the_bytes_in_their_own_dtype():
    model = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    raw = model[0].weight.detach().view(torch.int16).numpy().tobytes()
    report = quantize_(model, "mxfp4", progress=False)
    assert report.layers[0].source_sha256 == hashlib.sha256(raw).hexdigest()


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3, 20])
def test_the_bytes_do_not_depend_on_the_workers(model, expected, workers):
    report = quantize_(model, FAST, workers=workers, progress=False)
    assert_same_state(model, expected)
    assert [layer.name for layer in report.layers] == NAMES


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_bytes_do_not_depend_on_the_threads_of_torch(model, expected, threads, workers):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        quantize_(model, FAST, workers=workers, progress=False)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_same_state(model, expected)


def test_the_threads_of_torch_are_those_from_before(model):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        quantize_weight(gaussian(32, 32), "mxfp4")
        assert torch.get_num_threads() == 2
        with pytest.raises(FormatError):
            quantize_weight(poisoned(math.nan), "mxfp4")
        assert torch.get_num_threads() == 2
        quantize_(model, FAST, workers=4, progress=False)
        assert torch.get_num_threads() == 2
        # A new thread starts with what the process was left with.
        with ThreadPoolExecutor() as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_one_weight_gives_the_bytes_of_its_layer(model, expected):
    weights = {name: layer.weight.detach().clone() for name, layer in linear_layers(model).items()}
    quantize_(model, FAST, progress=False)
    for name in ("blocks.0.up", "blocks.1.attn"):
        assert_same_solution(
            quantize_weight(weights[name], FAST, name=name), model.get_submodule(name)
        )


def test_the_seed_and_the_name_and_nothing_else_decide():
    weight = dit_like(96, 128)
    first = QuantizedLinear.from_packed(quantize_weight(weight, FAST, seed=1, name="a").packed)
    torch.manual_seed(123)
    torch.rand(7)
    assert_same_solution(quantize_weight(weight, replace(FAST, seed=1), name="a"), first)
    for change in ({"seed": 2, "name": "a"}, {"seed": 1, "name": "b"}):
        other = QuantizedLinear.from_packed(quantize_weight(weight, FAST, **change).packed)
        assert not torch.equal(other.proj_up_packed, first.proj_up_packed)


def test_solving_does_not_touch_the_random_state(model):
    torch.manual_seed(5)
    quantize_(model, FAST, progress=False)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)


# --- interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("k", [1, 3])
def test_an_interrupted_run_is_finished_by_calling_again(model, expected, k, workers):
    def interrupt(done: int, total: int, name: str, error: float) -> None:
        if done == k:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_(model, FAST, workers=workers, progress=interrupt)
    assert list(quantized_layers(model)) == NAMES[:k]
    assert set(linear_layers(model)) == {*NAMES[k:], "embedder", "proj_out"}
    report = quantize_(model, FAST, workers=workers, progress=False)
    assert [layer.name for layer in report.layers] == NAMES[k:]
    assert_same_state(model, expected)


def test_calling_again_on_a_finished_model_changes_nothing(model, expected):
    quantize_(model, FAST, progress=False)
    calls = []
    report = quantize_(model, FAST, progress=lambda *call: calls.append(call))
    assert report.layers == ()
    assert report.mean_relative_error == 0.0
    assert calls == []
    assert_same_state(model, expected)


def test_an_error_in_the_progress_function_comes_out_as_it_is(model):
    class OwnError(Exception):
        pass

    def fail(*call: object) -> None:
        raise OwnError

    with pytest.raises(OwnError):
        quantize_(model, FAST, progress=fail)
    assert list(quantized_layers(model)) == NAMES[:1]


# --- refused before anything changes --------------------------------------------------------------


def set_weight(model: nn.Module, weight: Tensor) -> None:
    model.blocks[1].down.weight = nn.Parameter(weight, requires_grad=False)


def poisoned(value: float) -> Tensor:
    weight = gaussian(96, 128)
    weight[5, 7] = value
    return weight


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (poisoned(math.nan), r"the value at \(5, 7\) is nan, and 1 of 12288 values are not finite"),
        (poisoned(-math.inf), r"the value at \(5, 7\) is -inf"),
        (
            torch.empty(96, 128, device="meta"),
            r"has no weights \(it is on the meta device\)\. Load the model first",
        ),
        (
            torch.ones(96, 128, dtype=torch.int8),
            r"has weights of torch\.int8\. Float weights of 16 bits or more",
        ),
        (
            torch.ones(96, 128).to(torch.float8_e4m3fn),
            r"has weights of torch\.float8_e4m3fn\. Float weights of 16 bits",
        ),
        (torch.ones(96, 128, dtype=torch.bool), r"has weights of torch\.bool"),
    ],
    ids=["NaN", "infinity", "meta", "int8", "fp8", "bool"],
)
def test_an_unusable_weight_is_named_before_anything_changes(model, weight, message):
    set_weight(model, weight)
    calls = []
    with pytest.raises(LayerError, match=rf"Layer 'blocks\.1\.down'.*{message}"):
        quantize_(model, FAST, progress=lambda *call: calls.append(call))
    assert calls == []
    assert not quantized_layers(model)


def test_an_unusable_weight_is_told_where_it_is_skipped(model, caplog):
    set_weight(model, poisoned(math.nan))
    report = quantize_(model, replace(FAST, rules=(Rule("blocks.1.*", skip=True),)), progress=False)
    assert [layer.name for layer in report.layers] == NAMES[:3]
    (told,) = caplog.messages
    assert (
        "holds NaN or infinity, which is copied: 'blocks.1.down.weight' (the value at (5, 7) i"
        in told
    )


def test_a_recipe_that_does_not_fit_a_layer_is_refused_before_anything_changes(model):
    model.blocks.append(nn.Linear(96, 4))
    with pytest.raises(
        SchemeError, match=r"Layer 'blocks\.2': Branch rank 8 is larger than min\(out, in\)"
    ):
        quantize_(model, FAST, progress=False)
    assert not quantized_layers(model)


@pytest.mark.parametrize(
    "recipe", ["mxfp4+w9a9", "nothing.toml", Recipe(FAST.scheme, rules=(Rule("*", skip=True),))]
)
def test_a_recipe_that_cannot_be_used_is_refused_before_anything_changes(model, recipe):
    with pytest.raises(RecipeError):
        quantize_(model, recipe, progress=False)
    assert not quantized_layers(model)


@pytest.mark.parametrize(
    "layer", [nn.Linear(64, 64), nn.Conv2d(64, 64, 1)], ids=["linear", "1×1 convolution"]
)
@pytest.mark.parametrize(
    "entry", [lambda layer: quantize_(layer, FAST, progress=False), lambda x: plan_model(x, FAST)]
)
def test_a_bare_layer_is_told_what_to_do(layer, entry):
    with pytest.raises(
        LayerError, match=r"itself a linear layer .*torch\.nn\.Sequential\(layer\).*quantize_weight"
    ):
        entry(layer)
    # The advice works.
    assert len(quantize_(nn.Sequential(layer), FAST, progress=False).layers) == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.SiLU()), "Nothing to quantize: 0 linear layers were found in Sequential"),
        (
            nn.ModuleDict({"proj_out": nn.Linear(8, 8)}),
            r"Nothing to quantize: 1 linear layers .*`skip = false`",
        ),
    ],
    ids=["no linear layer", "all skipped"],
)
def test_nothing_to_quantize_is_an_error(model, message):
    with pytest.raises(RecipeError, match=message):
        quantize_(model, "mxfp4", progress=False)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_layer_that_fails_in_the_solver_is_named_and_the_ones_before_it_are_done(
    model, monkeypatch, workers
):
    class Failing(RTN):
        def check(self, scheme: Scheme) -> None:
            pass

        def solve(
            self, weight: Tensor, scheme: Scheme, *, seed: int = 0, stats: None = None
        ) -> LayerSolution:
            raise ZeroDivisionError("of course")

    solver = Recipe.solver
    bad = replace(FAST, rules=(Rule("blocks.1.attn", weight="mxint4"),))
    monkeypatch.setattr(
        Recipe, "solver", lambda self, s: Failing() if s.weight == "mxint4" else solver(self, s)
    )
    with pytest.raises(
        LayerError, match=r"Layer 'blocks\.1\.attn' failed: ZeroDivisionError: of course"
    ) as caught:
        quantize_(model, bad, workers=workers, progress=False)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert list(quantized_layers(model)) == NAMES[:3]


# --- progress -------------------------------------------------------------------------------------


def test_the_progress_function_is_called_after_each_layer(model):
    calls, done = [], []

    def show(*call: object) -> None:
        calls.append(call)
        done.append(list(quantized_layers(model)))

    report = quantize_(model, FAST, workers=2, progress=show)
    assert calls == [
        (i + 1, 6, layer.name, layer.relative_error) for i, layer in enumerate(report.layers)
    ]
    assert done == [NAMES[: i + 1] for i in range(6)]


def test_progress_goes_to_stderr_and_nothing_to_stdout(model, capsys):
    report = quantize_(model, FAST, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 6
    for i, (line, layer) in enumerate(zip(lines, report.layers, strict=True)):
        assert line.startswith(f"quantize: layer {i + 1} of 6, error {layer.relative_error:.4f}, ")
        assert line.endswith(layer.name)


def test_no_progress_writes_nothing(model, capsys):
    quantize_(model, FAST, progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_float_weight_is_freed_when_its_layer_is_done(model, workers):
    weights = {name: weakref.ref(layer.weight) for name, layer in linear_layers(model).items()}
    alive = []

    def look(*call: object) -> None:
        alive.append({name for name in NAMES if weights[name]() is not None})

    quantize_(model, FAST, workers=workers, progress=look)
    assert alive == [set(NAMES[i + 1 :]) for i in range(6)]
    assert weights["embedder"]() is not None


# --- one weight -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_a_weight_of_any_float_dtype_is_solved_and_left_as_it_was(dtype):
    weight = dit_like(48, 96).to(dtype)
    before = weight.clone()
    solution = quantize_weight(weight, "mxfp4+w8a8-r8")
    assert torch.equal(weight, before)
    assert solution.reconstruct().dtype == torch.float32
    error = ((weight.float() - solution.reconstruct()).norm() / weight.float().norm()).item()
    assert solution.relative_error == pytest.approx(error, rel=1e-3)
    assert 0 < solution.relative_error < 0.1


def test_a_parameter_and_a_view_give_the_bytes_of_a_plain_weight():
    weight = dit_like(96, 128)
    plain = QuantizedLinear.from_packed(quantize_weight(weight, FAST).packed)
    assert_same_solution(quantize_weight(nn.Parameter(weight), FAST), plain)
    assert_same_solution(quantize_weight(weight.T.contiguous().T, FAST), plain)
    assert not quantize_weight(nn.Parameter(weight), FAST).reconstruct().requires_grad


def test_method_and_seed_override_those_of_the_recipe():
    weight, recipe = dit_like(48, 96), replace(FAST, method="lqer", seed=4)
    lqer = QuantizedLinear.from_packed(quantize_weight(weight, recipe).packed)
    assert_same_solution(quantize_weight(weight, FAST, method="lqer", seed=4), lqer)
    assert quantize_weight(weight, recipe, method="svdquant").metrics["rounds"] == 1
    assert "objective" in quantize_weight(weight, recipe, method="loraq").metrics


def test_without_a_branch_the_method_does_not_matter():
    weight = dit_like(48, 96)
    plain = QuantizedLinear.from_packed(quantize_weight(weight, "mxfp4", method="rtn").packed)
    for method in ("loraq", "svdquant", "lqer"):
        assert_same_solution(quantize_weight(weight, "mxfp4", method=method), plain)
    assert_same_solution(quantize_weight(weight, "mxfp4+w8a8-h0", method="rtn"), plain)


def test_the_name_of_a_weight_selects_the_rules():
    weight = gaussian(32, 64)
    recipe = Recipe(Scheme("mxfp4"), rules=(Rule("*.ff", weight="mxint8"),))
    assert quantize_weight(weight, recipe, name="blocks.0.ff").packed.scheme == Scheme("mxint8")
    assert quantize_weight(weight, recipe).packed.scheme == Scheme("mxfp4")
    with pytest.raises(
        RecipeError,
        match=r"The recipe skips layer 'proj_out'\. Use another name, or remove the rule",
    ):
        quantize_weight(weight, recipe, name="proj_out")


@pytest.mark.parametrize(
    ("weight", "arguments", "error", "message"),
    [
        (
            gaussian(8, 8),
            {"recipe": "mxfp4", "method": "hqq"},
            RecipeError,
            "Unknown method 'hqq'.*loraq, lqer, qera",
        ),
        (gaussian(8, 8), {"recipe": "mxfp9"}, RecipeError, "Unknown number format 'mxfp9'"),
        (gaussian(8, 8), {"recipe": "mxfp4+bf16-r9"}, SchemeError, "Branch rank 9 is larger"),
        (
            torch.ones(8, 8).int(),
            {"recipe": "mxfp4"},
            FormatError,
            r"of torch\.int32\. Loaded float weights",
        ),
        (torch.ones(8, 8, device="meta"), {"recipe": "mxfp4"}, FormatError, "on the meta device"),
        (
            gaussian(8, 8)[0],
            {"recipe": "mxfp4"},
            SchemeError,
            r"shape \(8,\)\. A matrix \(out, in\) is required",
        ),
        (torch.ones(2, 3, 4), {"recipe": "mxfp4"}, SchemeError, r"shape \(2, 3, 4\)"),
        (torch.ones(0, 8), {"recipe": "mxfp4"}, SchemeError, r"shape \(0, 8\)"),
        (
            poisoned(math.nan),
            {"recipe": "mxfp4"},
            FormatError,
            r"'mxfp4': the value at \(5, 7\) is nan",
        ),
        (
            poisoned(math.inf),
            {"recipe": "mxfp4+w8a8-r4"},
            FormatError,
            r"the value at \(5, 7\) is inf",
        ),
    ],
)
def test_what_cannot_be_solved_says_why(weight, arguments, error, message):
    with pytest.raises(error, match=message):
        quantize_weight(weight, **arguments)


def test_a_deep_copy_of_a_quantized_model_is_a_quantized_model(model):
    quantize_(model, FAST, progress=False)
    twin, x = copy.deepcopy(model), gaussian(3, 16)
    assert torch.equal(twin(x), model(x))
    assert_same_state(twin, model.state_dict())
