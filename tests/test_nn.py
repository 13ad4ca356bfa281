"""`QuantizedLinear` and `QuantizedConv1x1`: the equation, what is accepted, and that nothing
changes packed bytes.
"""

import copy
import pickle
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import loraq
from benchmarks.worlds.matrices import dit_like, gaussian
from loraq.errors import FormatError, KernelError, LayerError, SchemeError
from loraq.formats import CastFormat, get_format
from loraq.nn import QuantizedConv1x1, QuantizedLayer, QuantizedLinear
from loraq.packed import LayerSolution
from loraq.pipeline.module import quantize_weight
from loraq.scheme import Branch, Scheme
from loraq.transforms import rotate

N_OUT, N_IN = 40, 112  # the last block is shorter for block sizes 32 and 64
MAINS = ("mxfp4", "int4", "nvfp4", "mxint4", "int5")
BRANCHES = ("", "+bf16-r12", "+w8a8-r12", "+w6a6-r12", "+w4a8-r12")
WIDTHS = ("-a4", "-a8", "-a16")
FAMILIES = [main + width + branch for main in MAINS for branch in BRANCHES for width in WIDTHS]
#: One name for every kind of stored tensor and of activation.
VARIED = [
    "mxfp4-a4+w8a8-r12",
    "nvfp4-a4+w6a6-r12",
    "int4-a8+bf16-r12",
    "mxint4-a16+w4a8-r12",
    "int5-a16",
    "int4-a8+w6a16-r12",
]

each_family = pytest.mark.parametrize("name", FAMILIES)
each_variety = pytest.mark.parametrize("name", VARIED)
each_backend = pytest.mark.parametrize("backend", ["reference", "resident"])


@cache
def solution_of(name: str) -> LayerSolution:
    return quantize_weight(dit_like(N_OUT, N_IN), name, method="svdquant")


def layer_of(name: str, *, backend: str = "resident", bias: bool = True) -> QuantizedLinear:
    layer = QuantizedLinear.from_packed(
        copy.deepcopy(solution_of(name)).packed, gaussian(1, N_OUT, 5)[0] if bias else None
    )
    return run_as_stored(layer, backend)


def run_as_stored(layer: QuantizedLayer, backend: str = "resident") -> QuantizedLayer:
    """Let a layer round its activations whether the machine gains by it or not."""
    layer.backend = backend
    layer.ask_activations("stored", simulate=True)
    return layer


def tokens(*leading: int, seed: int = 1) -> Tensor:
    return torch.randn((*leading, N_IN), generator=torch.Generator().manual_seed(seed))


def packed_bytes(layer: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.clone()
        for name, tensor in layer.state_dict().items()
        if tensor.dtype == torch.uint8
    }


def assert_same_bytes(layer: nn.Module, before: dict[str, Tensor]) -> None:
    after = packed_bytes(layer)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def error(y: Tensor, expected: Tensor) -> float:
    return (
        torch.linalg.vector_norm(y.double() - expected)
        / torch.linalg.vector_norm(expected.double())
    ).item()


def on_the_grid(token: Tensor, name: str) -> Tensor:
    """A single token in a number format; nothing else is there to share a scale with."""
    fmt = get_format(name).for_rows()
    return token if isinstance(fmt, CastFormat) else fmt.quantize(token[None]).dequantize()[0]


def evaluate(solution: LayerSolution, bias: Tensor, x: Tensor) -> Tensor:
    """Y = Qa(x) Wqᵀ + Qp(Qb(x) Dᵀ) Uᵀ + b of the rotated x in double precision, token by token."""
    scheme, weight = solution.packed.scheme, solution.packed.main.dequantize().double()
    rows = []
    for token in rotate(x, scheme.rotation):
        y = weight @ on_the_grid(token, scheme.activation).double() + bias.double()
        if solution.packed.branch is not None:
            down, up = (
                q.dequantize().double()
                for q in (solution.packed.branch.proj_down, solution.packed.branch.proj_up)
            )
            inner = (down @ on_the_grid(token, scheme.branch.activation).double()).float()
            y += (
                up
                @ on_the_grid(
                    inner, scheme.branch.intermediate or scheme.branch.activation
                ).double()
            )
        rows.append(y)
    return torch.stack(rows)


# --- the equation ---------------------------------------------------------------------------------


@each_backend
@each_family
def test_forward_is_the_equation(name, backend):
    layer, x = layer_of(name, backend=backend), tokens(6)
    assert error(layer(x), evaluate(solution_of(name), layer.bias, x)) < 1e-5


@each_backend
@pytest.mark.parametrize("name", [name for name in FAMILIES if "-a16" in name])
def test_with_16_bit_activations_it_is_a_linear_layer_of_the_reconstruction(name, backend):
    layer, x = layer_of(name, backend=backend), tokens(6)
    assert torch.equal(layer.reconstruct(), solution_of(name).reconstruct())
    assert (
        error(
            layer(x),
            nn.functional.linear(x.double(), layer.reconstruct().double(), layer.bias.double()),
        )
        < 1e-6
    )


@pytest.mark.parametrize("intermediate", ["bf16", "mxint8", "mxfp4"])
def test_the_rank_space_intermediate_has_a_format_of_its_own(intermediate):
    scheme = Scheme("mxfp4", "mxfp4", Branch(12, "mxint8", "mxint8", intermediate))
    solution, x = quantize_weight(dit_like(N_OUT, N_IN), scheme, method="svdquant"), tokens(6)
    layer = run_as_stored(QuantizedLinear.from_packed(solution.packed))
    assert error(layer(x), evaluate(solution, torch.zeros(N_OUT), x)) < 1e-5


def test_the_formats_of_the_activations_make_a_difference():
    x = tokens(6)
    outputs = [layer_of(f"mxfp4{width}+w8a8-r12")(x) for width in WIDTHS]
    exact = nn.functional.linear(
        x, layer_of("mxfp4-a16+w8a8-r12").reconstruct(), gaussian(1, N_OUT, 5)[0]
    ).double()
    coarse, fine, none = (error(y, exact) for y in outputs)
    assert coarse > 3 * fine > 0
    assert fine > 1e3 * none


@each_variety
def test_a_layer_without_bias_leaves_it_out(name):
    x = tokens(4)
    torch.testing.assert_close(
        layer_of(name, bias=False)(x) + gaussian(1, N_OUT, 5)[0], layer_of(name)(x)
    )


# --- what it accepts ------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize(
    "leading", [(), (0,), (1,), (3,), (2, 3), (2, 0, 3), (1, 2, 1, 2)], ids=str
)
@each_variety
def test_any_leading_shape(name, leading, backend):
    layer, x = layer_of(name, backend=backend), tokens(*leading)
    y = layer(x)
    assert y.shape == (*leading, N_OUT)
    if x.numel():
        flat = x.reshape(-1, N_IN)
        assert error(y.reshape(-1, N_OUT), evaluate(solution_of(name), layer.bias, flat)) < 1e-5


@each_variety
def test_strides_do_not_matter(name):
    layer, x = layer_of(name), tokens(3, 4)
    expected = layer(x)
    assert torch.equal(layer(x.transpose(0, 1).contiguous().transpose(0, 1)), expected)
    assert torch.equal(layer(x.repeat_interleave(2, -1)[..., ::2]), expected)
    assert torch.equal(layer(x[:1].expand(3, 4, N_IN)), expected[:1].expand(3, 4, N_OUT))


@each_backend
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 1e-3)],
    ids=str,
)
@each_variety
def test_the_output_has_the_dtype_of_the_input(name, dtype, bound, backend):
    layer, x = layer_of(name, backend=backend), tokens(8).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert error(y, evaluate(solution_of(name), layer.bias, x.float())) < bound


def test_inputs_of_another_dtype_get_operands_of_their_own():
    name, x = "int4-a16+w8a8-r12", tokens(4)
    inputs = [x, x.bfloat16(), x, x.half(), x.bfloat16(), x.double()]
    layer = layer_of(name)
    for each in inputs:
        assert torch.equal(layer(each), layer_of(name)(each))


@each_backend
@each_variety
def test_tokens_do_not_see_each_other(name, backend):
    layer, x = layer_of(name, backend=backend), tokens(5)
    alone = layer(x)
    for neighbour in (1e6 * x, 0 * x, torch.full_like(x, torch.nan)):
        mixed = neighbour.clone()
        mixed[2] = x[2]
        assert torch.equal(layer(mixed)[2], alone[2])


@each_variety
def test_a_token_of_zeros_gives_the_bias(name):
    layer = layer_of(name)
    assert torch.equal(layer(torch.zeros(2, N_IN)), layer.bias.detach().expand(2, -1))


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn],
    ids=str,
)
@each_variety
def test_an_input_that_is_no_float_is_refused_as_a_linear_layer_refuses_it(name, dtype):
    layer, x = layer_of(name), torch.ones(3, N_IN).to(dtype)
    with pytest.raises(RuntimeError, match="same dtype"):
        nn.Linear(N_IN, N_OUT)(x)
    with pytest.raises(KernelError, match=rf"is of {dtype}. It takes floats: torch.float32"):
        layer(x)
    assert issubclass(KernelError, RuntimeError)


@each_backend
@pytest.mark.parametrize("shape", [(), (N_IN - 1,), (3, N_IN + 1), (N_IN, 3), (3, 1), (0,)])
@each_variety
def test_an_input_of_another_width_is_refused_before_the_back_end_sees_it(name, shape, backend):
    layer, x = layer_of(name, backend=backend), torch.ones(shape)
    with pytest.raises(RuntimeError):
        nn.Linear(N_IN, N_OUT)(x)
    with pytest.raises(KernelError, match=rf"must have the layer's {N_IN} input channels"):
        layer(x)
    assert layer.kept_nbytes == 0


@pytest.mark.parametrize("shape", [(), (8,), (8, 8), (8, 8, 8), (2, 7, 3, 3)])
def test_a_convolution_refuses_other_channels(shape):
    packed = quantize_weight(gaussian(6, 16), "int5-a16").packed
    layer = QuantizedConv1x1.from_packed(packed)
    with pytest.raises(KernelError, match=r"Axis -3 must have the layer's 16 input channels"):
        layer(torch.ones(shape))
    with pytest.raises(KernelError, match=r"is of torch.int32"):
        layer(torch.ones((1, 16, 3, 3), dtype=torch.int32))
    assert layer(torch.ones(0, 16, 3, 3)).shape == (0, 6, 3, 3)


# --- autocast -------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@each_variety
def test_autocast_casts_the_input_as_for_a_linear_layer(name, given, dtype, backend):
    layer, x = layer_of(name, backend=backend), tokens(4).to(given)
    linear = nn.Linear(N_IN, N_OUT).double() if given == torch.float64 else nn.Linear(N_IN, N_OUT)
    seen = x if given == torch.float64 else x.to(dtype)
    plain, expected = layer(x), layer(seen)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        assert y.dtype == linear(x).dtype == seen.dtype
        assert torch.equal(y, expected)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(layer(x), plain)
        other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        with torch.autocast("cpu", other):
            assert layer(x).dtype == (x.dtype if given == torch.float64 else other)
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), plain)


def test_autocast_of_another_device_changes_nothing():
    layer, x = layer_of("mxfp4-a4+w8a8-r12"), tokens(4)
    plain = layer(x)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert torch.equal(layer(x), plain)
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_a_layer_that_prepares_itself_under_autocast_keeps_what_others_need():
    name, x = "mxint4-a16+w4a8-r12", tokens(4)
    layer, expected = layer_of(name), layer_of(name)(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer.prepare(torch.float32)
        assert torch.equal(layer.reconstruct(), solution_of(name).reconstruct())
    assert torch.equal(layer(x), expected)


def test_autocast_casts_the_input_of_a_convolution():
    packed = quantize_weight(gaussian(6, 16), "mxfp4-a8+w8a8-r2", method="svdquant").packed
    layer, x = QuantizedConv1x1.from_packed(packed), torch.randn(2, 16, 3, 5)
    expected = layer(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_a_gradient_under_autocast_comes_back_in_the_dtype_of_the_input():
    layer, x = layer_of("mxfp4-a4+w8a8-r12"), tokens(4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert x.grad.any()


# --- state ----------------------------------------------------------------------------------------


@each_family
def test_state_dict_round_trip_is_strict_and_exact(name):
    layer, x = layer_of(name), tokens(3)
    empty = run_as_stored(QuantizedLinear(N_IN, N_OUT, layer.scheme))
    result = empty.load_state_dict(layer.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_bytes(empty, packed_bytes(layer))
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("int5-a16", ["weight_packed", "weight_scale"]),
        ("nvfp4-a4", ["weight_global_scale", "weight_packed", "weight_scale"]),
        (
            "mxfp4-a4+w8a8-r12",
            [
                f"{part}_{kind}"
                for part in ("proj_down", "proj_up", "weight")
                for kind in ("packed", "scale")
            ],
        ),
        (
            "mxfp4-a4+bf16-r12",
            ["proj_down_packed", "proj_up_packed", "weight_packed", "weight_scale"],
        ),
    ],
)
def test_every_tensor_but_the_bias_is_raw_bytes_that_take_no_gradient(name, parts):
    layer = layer_of(name)
    parameters = dict(layer.named_parameters())
    assert sorted(parameters) == sorted(["bias", *parts])
    assert sorted(layer.state_dict()) == sorted(parameters)
    assert not list(layer.buffers())
    assert {name for name, p in parameters.items() if p.dtype != torch.uint8} == {"bias"}
    assert not any(p.requires_grad for name, p in parameters.items() if name != "bias")
    layer(tokens(2))
    # Kept operands are not part of the state.
    assert dict(layer.named_parameters()).keys() == parameters.keys()
    assert layer.state_dict().keys() == parameters.keys()


@each_family
def test_its_bytes_are_those_of_the_solution_and_of_the_scheme(name):
    layer, solution = layer_of(name), solution_of(name)
    assert layer.nbytes == solution.nbytes == layer.scheme.nbytes((N_OUT, N_IN))
    assert layer.bits_per_weight == solution.bits_per_weight == 8 * layer.nbytes / (N_OUT * N_IN)
    assert torch.equal(layer.packed.main.dequantize(), solution.packed.main.dequantize())
    assert (layer.packed.branch is None) == (solution.packed.branch is None)


def test_a_state_of_another_scheme_is_refused():
    state = layer_of("mxfp4-a4+w8a8-r12").state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*proj_down_packed"):
        QuantizedLinear(N_IN, N_OUT, Scheme("mxfp4")).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_global_scale"):
        QuantizedLinear(N_IN, N_OUT, Scheme("nvfp4", branch=Branch(12, "mxint8"))).load_state_dict(
            state
        )
    with pytest.raises(RuntimeError, match="size mismatch for proj_up_packed"):
        QuantizedLinear(N_IN, N_OUT, Scheme("mxfp4", branch=Branch(8, "mxint8"))).load_state_dict(
            state
        )


@pytest.mark.parametrize("assign", [False, True])
@each_variety
def test_loading_a_state_drops_decoded_operands(name, assign):
    layer, x = layer_of(name), tokens(3)
    layer(x)
    other = QuantizedLinear.from_packed(
        quantize_weight(dit_like(N_OUT, N_IN, 9), layer.scheme, method="svdquant").packed,
        gaussian(1, N_OUT, 6)[0],
    )
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert_same_bytes(layer, packed_bytes(other))
    assert torch.equal(layer(x), run_as_stored(other)(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_numbers_in_place_of_bytes_is_refused(assign):
    layer, x = layer_of("mxfp4-a4+w8a8-r12"), tokens(3)
    before, expected = packed_bytes(layer), layer(x)
    state = {name: tensor.float() for name, tensor in layer.state_dict().items()}
    with pytest.raises(KernelError, match=r"'weight_packed' of the state is of torch.float32"):
        layer.load_state_dict(state, assign=assign)
    assert_same_bytes(layer, before)
    assert torch.equal(layer(x), expected)


def test_an_assigned_scheme_is_what_the_next_call_runs():
    layer, x = layer_of("mxfp4-a4+w8a8-r12"), tokens(3)
    layer(x)
    branch = replace(layer.scheme.branch, activation="bf16", intermediate=None)
    layer.scheme = Scheme("mxfp4", "bf16", branch, layer.scheme.rotation)
    for scheme in (layer.scheme, replace(layer.scheme, branch=None)):
        layer.scheme = scheme
        fresh = run_as_stored(QuantizedLinear.from_packed(layer.packed, layer.bias))
        assert torch.equal(layer(x), fresh(x))


@pytest.mark.parametrize(
    ("scheme", "error"),
    [
        (Scheme("nvfp4", "nvfp4"), FormatError),
        (Scheme("mxfp4", branch=Branch(16, "mxint8")), FormatError),
        (Scheme("mxfp4", branch=Branch(0, "mxint8")), SchemeError),
        (Scheme("mxfp4", branch=Branch(N_OUT + 1, "mxint8")), SchemeError),
    ],
)
def test_a_scheme_of_other_bytes_is_refused_and_changes_nothing(scheme, error):
    layer, x = layer_of("mxfp4-a4+w8a8-r12"), tokens(3)
    before, expected = layer.scheme, layer(x)
    with pytest.raises(error):
        layer.scheme = scheme
    assert layer.scheme == before
    assert torch.equal(layer(x), expected)


def test_an_assigned_parameter_is_what_the_next_call_runs():
    layer, x = layer_of("mxfp4-a4"), tokens(3)
    layer(x)
    layer.weight_packed = nn.Parameter(torch.zeros_like(layer.weight_packed), requires_grad=False)
    assert torch.equal(layer(x), layer.bias.detach().expand(3, -1))


@pytest.mark.parametrize("name", ["nothing", None, 0, True, ["resident"], 1.5])
def test_a_back_end_that_does_not_exist_changes_nothing(name):
    layer, x = layer_of("mxfp4-a4+w8a8-r12"), tokens(3)
    expected = layer(x)
    with pytest.raises(KernelError, match="Unknown back end"):
        layer.backend = name
    assert layer.backend == "resident"
    assert torch.equal(layer(x), expected)


def test_loading_a_state_into_a_model_drops_decoded_operands_too():
    model, x = nn.Sequential(layer_of("mxfp4-a4"), nn.SiLU()), tokens(3)
    before = model(x)
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert not torch.equal(model(x), before)
    assert torch.equal(model(x), torch.zeros(3, N_OUT))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.float16),
        lambda model: model.train().eval().requires_grad_(False),
        copy.deepcopy,
        copy.copy,
    ],
    ids=["half", "bfloat16", "double", "to dtype", "to both", "modes", "deepcopy", "copy"],
)
@each_variety
def test_casts_and_copies_leave_the_packed_bytes_alone(name, change):
    model, x = nn.Sequential(layer_of(name)), tokens(3)
    before, output = packed_bytes(model), model(x)
    changed = change(model)
    assert_same_bytes(changed, before)
    assert changed[0].scheme == model[0].scheme
    assert changed[0].bits_per_weight == model[0].bits_per_weight
    assert error(changed(x), output.double()) < 5e-3  # the bias may have become shorter


@pytest.mark.parametrize("change", [nn.Module.half, lambda layer: layer.to("meta"), nn.Module.cpu])
def test_a_move_or_a_cast_drops_decoded_operands(change):
    layer = layer_of("mxfp4-a4+w8a8-r12")
    layer(tokens(3))
    assert layer._prepared is not None
    assert change(layer)._prepared is None


def test_a_cast_reaches_the_bias():
    assert layer_of("mxfp4-a4").half().bias.dtype == torch.float16


def test_a_deep_copy_shares_nothing_and_decodes_anew():
    layer, x = layer_of("mxfp4-a4+w8a8-r12"), tokens(3)
    output = layer(x)
    twin = copy.deepcopy(layer)
    assert twin._prepared is None
    assert torch.equal(twin(x), output)
    for name, parameter in twin.named_parameters():
        parameter.data.zero_()
        assert dict(layer.named_parameters())[name].any()
    twin.load_state_dict(twin.state_dict())
    assert torch.equal(twin(x), torch.zeros(3, N_OUT))
    assert torch.equal(layer(x), output)


@each_variety
def test_the_meta_device_keeps_shapes_and_assign_brings_the_bytes_back(name):
    layer, x = layer_of(name), tokens(3)
    state, output = layer.state_dict(), layer(x)
    ghost = copy.deepcopy(layer).to("meta")
    assert all(p.is_meta for p in ghost.parameters())
    assert {n: (p.shape, p.dtype) for n, p in ghost.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in layer.named_parameters()
    }
    assert ghost(torch.empty(2, 5, N_IN, device="meta")).shape == (2, 5, N_OUT)
    assert ghost.nbytes == layer.nbytes
    ghost.load_state_dict(state, assign=True)
    assert_same_bytes(ghost, packed_bytes(layer))
    assert torch.equal(ghost(x), output)


@each_variety
def test_an_empty_layer_on_the_meta_device_has_the_shapes_of_a_filled_one(name):
    layer = layer_of(name)
    empty = QuantizedLinear(N_IN, N_OUT, layer.scheme, device="meta", dtype=torch.bfloat16)
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in layer.named_parameters()
    }
    assert empty.bias.dtype == torch.bfloat16
    assert QuantizedLinear(N_IN, N_OUT, layer.scheme, bias=False, device="meta").bias is None


def test_the_bias_is_taken_over_as_it_is():
    bias = nn.Parameter(torch.randn(N_OUT), requires_grad=False)
    assert QuantizedLinear.from_packed(solution_of("mxfp4-a4").packed, bias).bias is bias
    assert QuantizedLinear.from_packed(solution_of("mxfp4-a4").packed).bias is None


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            Scheme("mxfp4", branch=Branch(41)),
            r"Branch rank 41 is larger than min\(out, in\).*rank of at most 40",
        ),
        (Scheme("mxfp4", branch=Branch()), r"no rank yet \(0\).*budget"),
    ],
)
def test_a_scheme_that_does_not_fit_makes_no_layer(scheme, message):
    with pytest.raises(SchemeError, match=message):
        QuantizedLinear(N_IN, N_OUT, scheme)


# --- back ends ------------------------------------------------------------------------------------


def test_the_back_end_is_switched_by_name():
    layer, x = layer_of("mxfp4-a4+w8a8-r12"), tokens(3)
    assert layer.backend == "resident"
    output = layer(x)
    layer.backend = "reference"
    assert layer.backend == "reference"
    assert torch.equal(layer(x), output)
    with pytest.raises(
        KernelError, match=r"Unknown back end 'resistant'\. Did you mean 'resident'"
    ):
        layer.backend = "resistant"
    assert layer.backend == "reference"


def test_the_representation_says_formats_rank_bits_and_back_end():
    assert repr(layer_of("mxfp4-a4+w8a8-r12")) == (
        "QuantizedLinear(in_features=112, out_features=40, bias=True, weight=mxfp4, "
        "activation=mxfp4, rotation=32, branch=r12 mxint8/mxint8, 7.70 bits per weight, "
        "backend=resident)"
    )
    assert repr(layer_of("int5-a16", backend="reference", bias=False)) == (
        "QuantizedLinear(in_features=112, out_features=40, bias=False, weight=int5, "
        "activation=bf16, 5.29 bits per weight, backend=reference)"
    )


def test_a_layer_that_refuses_the_back_end_of_the_environment_runs_on_the_automatic_one(
    monkeypatch, caplog
):
    monkeypatch.setenv("LORAQ_BACKEND", "int8_row")
    layer, plain = layer_of("mxfp4-a16+w8a8-r12", backend="auto"), layer_of("mxfp4-a16+w8a8-r12")
    assert repr(layer).endswith("backend=low_memory)")
    assert error(layer(tokens(3)), plain(tokens(3))) < 1e-5
    layer(tokens(2))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "on cpu: low_memory (not int8_row: its activations are 'bf16'" in record.getMessage()
    with pytest.raises(
        KernelError, match=r"'int8_row' cannot run a layer 40×112 in 'mxfp4': its activations are"
    ):
        layer.backend = "int8_row"
    assert layer.backend == "low_memory"


def test_the_representation_shows_a_back_end_that_refuses_the_layer_by_now(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layer = layer_of("mxfp4-amxfp8_e4m3", backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert repr(layer).endswith("backend=triton (refused))")


# --- gradients and compilation --------------------------------------------------------------------


@each_backend
@each_family
def test_the_gradient_of_the_input_is_that_of_the_reconstruction(name, backend):
    # Exact for 16-bit activations; rounded ones let it pass straight through, so that adapters can
    # be trained.
    layer, x = layer_of(name, backend=backend), tokens(3).requires_grad_()
    toward = gaussian(3, N_OUT, 8)
    (layer(x) * toward).sum().backward()
    assert error(x.grad, toward.double() @ layer.reconstruct().double()) < 1e-5
    torch.testing.assert_close(layer.bias.grad, toward.sum(0))
    assert all(p.grad is None for name, p in layer.named_parameters() if name != "bias")


def test_the_gradient_has_the_dtype_of_the_input():
    layer, x = layer_of("mxfp4-a4+w8a8-r12"), tokens(3).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert error(x.grad, layer.reconstruct().double().sum(0).expand(3, -1)) < 2e-2


@each_variety
def test_tracking_gradients_does_not_change_the_output(name):
    layer, x = layer_of(name), tokens(3)
    with torch.no_grad():
        expected = layer(x)
    assert torch.equal(layer(x.requires_grad_()), expected)


def test_a_layer_first_run_in_inference_mode_can_be_trained_through_later():
    layer, x = layer_of("mxfp4-a4+w8a8-r12"), tokens(3)
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y, expected.clone())
    assert x.grad is not None


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's own compiler
@pytest.mark.parametrize("name", ["mxfp4-a4+w8a8-r12", "nvfp4-a16+bf16-r12", "int4-a4+bf16-r12"])
def test_compiled_it_is_one_graph_with_the_same_output(name):
    layer, x = layer_of(name), tokens(3)
    expected, before = layer_of(name)(x), packed_bytes(layer)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        # The first call decodes the operands, the second finds them.
        first, second = (
            compiled(x),
            compiled(x),
        )
    assert error(first, expected.detach().double()) < 1e-5
    assert error(second, expected.detach().double()) < 1e-5
    assert_same_bytes(layer, before)


# --- 1×1 convolutions -----------------------------------------------------------------------------


def conv_of(name: str, *, backend: str = "resident", bias: bool = True) -> QuantizedConv1x1:
    layer = QuantizedConv1x1.from_packed(
        copy.deepcopy(solution_of(name)).packed, gaussian(1, N_OUT, 5)[0] if bias else None
    )
    return run_as_stored(layer, backend)


def picture(*leading: int, seed: int = 1) -> Tensor:
    return torch.randn((*leading, N_IN, 5, 3), generator=torch.Generator().manual_seed(seed))


@each_backend
@each_variety
def test_a_convolution_is_the_linear_layer_on_every_pixel(name, backend):
    x = picture(2)
    pixels = x.permute(0, 2, 3, 1).contiguous()
    expected = layer_of(name, backend=backend)(pixels).permute(0, 3, 1, 2)
    assert torch.equal(conv_of(name, backend=backend)(x), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_only_convolution_is_the_float_convolution_of_its_reconstruction(bias):
    layer = conv_of("mxint4-a16+w8a8-r12", bias=bias)
    x = picture(2)
    expected = nn.functional.conv2d(x.double(), layer.reconstruct().double()[..., None, None])
    expected = expected + layer.bias.double()[:, None, None] if bias else expected
    assert error(layer(x), expected) < 1e-6


def test_a_convolution_takes_a_picture_without_a_batch():
    layer, x = conv_of("mxfp4-a4+w8a8-r12"), picture()
    assert torch.equal(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_keeps_the_layout_in_memory(layout):
    x = picture(2).contiguous(memory_format=layout)
    y = conv_of("mxfp4-a16+w8a8-r12")(x)
    assert torch.equal(y, conv_of("mxfp4-a16+w8a8-r12")(picture(2)))
    assert y.shape == (2, N_OUT, 5, 3)
    assert y.is_contiguous(memory_format=layout)


def test_a_convolution_stores_what_a_linear_layer_stores_and_knows_its_channels():
    conv, linear = conv_of("mxfp4-a4+w8a8-r12"), layer_of("mxfp4-a4+w8a8-r12")
    assert_same_bytes(conv, packed_bytes(linear))
    assert (conv.in_channels, conv.out_channels) == (N_IN, N_OUT)
    assert conv.nbytes == linear.nbytes


def test_a_convolution_sends_a_gradient_to_its_input():
    x = picture(1).requires_grad_()
    conv_of("mxfp4-a16+bf16-r12")(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_a_call_keeps_the_operands_it_made_though_another_thread_drops_them():
    class Dropped(QuantizedLinear):
        """A layer whose operands are gone as soon as they are kept."""

        _prepared = property(lambda self: None, lambda self, value: None)

    packed = quantize_weight(torch.randn(32, 64), "mxfp4-a8+w8a8-r4", method="svdquant").packed
    x = torch.randn(3, 64)
    assert torch.equal(Dropped.from_packed(packed)(x), QuantizedLinear.from_packed(packed)(x))


@each_variety
def test_readers_of_the_weight_get_the_decoded_one_in_the_dtype_of_the_bias(name):
    for dtype in (torch.float32, torch.bfloat16):
        layer, conv = layer_of(name).to(dtype), conv_of(name).to(dtype)
        wanted = layer.reconstruct().to(dtype)
        assert layer.weight.dtype == conv.weight.dtype == dtype
        assert torch.equal(layer.weight, wanted)
        assert conv.weight.shape == (N_OUT, N_IN, 1, 1)
        assert torch.equal(conv.weight[..., 0, 0], wanted)


def test_without_a_bias_the_weight_has_the_dtype_that_the_float_layer_would_have():
    layer = layer_of("mxfp4-a4+w8a8-r12", bias=False)
    assert layer.weight.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert layer.to(dtype).weight.dtype == dtype
        assert copy.deepcopy(layer).weight.dtype == dtype
        assert pickle.loads(pickle.dumps(layer)).weight.dtype == dtype
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    loraq.quantize_(model, "int8", progress=False)
    assert model[0].weight.dtype == torch.bfloat16
    assert model.to("meta")[0].weight.is_meta


def test_the_weight_is_no_parameter_and_cannot_be_replaced():
    layer = layer_of("mxfp4-a4+w8a8-r12")
    before = layer.reconstruct()
    assert "weight" not in dict(layer.named_parameters())
    assert not isinstance(layer.weight, nn.Parameter)
    for value in (torch.zeros(N_OUT, N_IN), nn.Parameter(torch.zeros(N_OUT, N_IN))):
        with pytest.raises(LayerError, match="read-only"):
            layer.weight = value
        with pytest.raises(LayerError, match="read-only"):
            layer.weight.data = value
    for reset in (layer.reset_parameters, conv_of("mxfp4-a4+w8a8-r12").reset_parameters):
        with pytest.raises(LayerError, match="read-only"):
            reset()
    assert torch.equal(layer.reconstruct(), before)


def test_a_layer_is_of_the_class_that_it_takes_the_place_of():
    layer, conv = layer_of("mxfp4-a4+w8a8-r12"), conv_of("mxfp4-a4+w8a8-r12")
    assert isinstance(layer, nn.Linear)
    assert not isinstance(layer, nn.Conv2d)
    assert isinstance(conv, nn.Conv2d)
    assert not isinstance(conv, nn.Linear)
    real = nn.Conv2d(N_IN, N_OUT, 1)
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(conv, name) == getattr(real, name)
    assert (conv.transposed, conv.output_padding) == (real.transposed, real.output_padding)


@pytest.mark.parametrize("bias", [True, False])
def test_code_that_reads_the_weight_compiles_without_a_break(bias):
    class Reader(nn.Module):
        """What T5 does, and worse."""

        def __init__(self) -> None:
            super().__init__()
            self.wo = layer_of("mxfp4-a16+w8a8-r12", bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self.wo.weight.dtype)
            return self.wo(x) + nn.functional.linear(x, self.wo.weight)

    x, reader = torch.randn(2, N_IN), Reader()
    compiled = torch.compile(reader, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), reader(x))
