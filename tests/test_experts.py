"""`QuantizedExperts` reads as the parameter that it stands for, and multiplies as linear layers."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear

from benchmarks.worlds.matrices import gaussian
from loraq.errors import KernelError, LayerError
from loraq.experts import QuantizedExperts
from loraq.layers import set_backend
from loraq.nn import QuantizedLinear
from loraq.packed import PackedStack
from loraq.parallel import _require_quantized
from loraq.pipeline.module import quantize_weight

E, OUT, IN = 3, 24, 64
RECIPE = "mxfp4+w8a8-r4"

each_way = pytest.mark.parametrize("transposed", [False, True])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
each_mode = pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.enable_grad, torch.inference_mode]
)


def make(
    *, transposed: bool = False, dtype: torch.dtype = torch.float32, recipe: str = RECIPE
) -> tuple[QuantizedExperts, list[QuantizedLinear]]:
    """A stack, and its experts as layers of their own."""
    solved = [
        quantize_weight(gaussian(OUT, IN, seed=seed), recipe, method="lqer").packed
        for seed in range(E)
    ]
    stack = QuantizedExperts.from_stack(PackedStack.of(solved), transposed=transposed, dtype=dtype)
    layers = [QuantizedLinear.from_packed(packed, dtype=dtype) for packed in solved]
    for layer in (stack, *layers):
        layer.ask_activations("stored", simulate=True)
    return stack, layers


def right(stack: QuantizedExperts) -> Tensor:
    """The parameter as (experts, in, out)."""
    return stack.weight if stack.transposed else stack.transpose(-2, -1)


@each_way
@each_dtype
@each_mode
def test_a_product_with_an_expert_is_that_of_its_layer(transposed, dtype, mode):
    stack, layers = make(transposed=transposed, dtype=dtype)
    x = gaussian(5, IN, seed=9).to(dtype)
    with mode():
        for e, layer in enumerate(layers):
            y, weight = layer(x), stack[e]
            matrix = weight.t() if transposed else weight  # (out, in)
            assert torch.equal(linear(x, matrix), y)
            assert torch.equal(x @ matrix.T, y)
            assert torch.equal(torch.matmul(x.view(1, 5, IN), matrix.mT), y[None])
            assert torch.equal(matrix @ x.t(), y.t())
            assert torch.equal(matrix @ x[0], layer(x[:1])[0])
            by_tensor = stack[torch.tensor(e)]
            assert torch.equal(linear(x, by_tensor.t() if transposed else by_tensor), y)
            assert torch.equal(linear(x.double(), matrix.double()), layer(x.double()))
            assert torch.equal(x[0] @ matrix.t(), layer(x[:1])[0])
            shift = gaussian(1, OUT, seed=3)[0].to(dtype)
            assert torch.equal(linear(x, matrix, shift), y + shift)


@each_way
@each_dtype
@each_mode
def test_a_product_with_all_experts_is_one_of_each(transposed, dtype, mode):
    stack, layers = make(transposed=transposed, dtype=dtype)
    x = gaussian(E * 5, IN, seed=9).to(dtype).view(E, 5, IN)
    with mode():
        want = torch.stack([layer(part) for layer, part in zip(layers, x, strict=True)])
        assert torch.equal(torch.bmm(x, right(stack)), want)
        assert torch.equal(x @ right(stack), want)
        assert torch.equal(torch.bmm(right(stack).mT, x.mT), want.mT)
        assert torch.equal(torch.einsum("eni,eio->eno", x, right(stack)), want)
        assert torch.equal(torch.einsum("eni,eoi->eno", x, right(stack).mT), want)
        rows, ends = x.flatten(0, 1), torch.tensor([2, 2, 9], dtype=torch.int32)
        want = torch.cat([layers[0](rows[:2]), layers[2](rows[2:9]), rows.new_zeros(6, OUT)])
        assert torch.equal(grouped_mm(rows, right(stack), offs=ends), want)
        assert torch.equal(rows @ right(stack), torch.stack([layer(rows) for layer in layers]))
        if transposed:  # the module itself, as its owner has it
            assert torch.equal(torch.bmm(x, stack), x @ stack.weight)
            assert torch.equal(x @ stack, x @ stack.weight)
            assert torch.equal(grouped_mm(rows, stack, offs=ends), want)


@each_way
def test_experts_may_be_chosen_for_each_token(transposed):
    stack, layers = make(transposed=transposed)
    x, chosen = gaussian(4, IN, seed=9), torch.tensor([2, 0, 2, 1])
    want = torch.stack([layers[e](x[n]) for n, e in enumerate(chosen.tolist())])
    weights = stack[chosen]
    matrices = weights.mT if transposed else weights
    assert matrices.shape == (4, OUT, IN)
    assert torch.allclose(torch.bmm(matrices, x[..., None])[..., 0], want, atol=1e-5)
    assert torch.allclose(torch.bmm(x[:, None], matrices.mT)[:, 0], want, atol=1e-5)
    few = stack.weight[1:3]
    assert torch.equal(x @ (few[1] if transposed else few[1].t()), layers[2](x))
    assert [torch.equal(a, b) for a, b in zip(stack, stack.weight, strict=True)] == [True] * E


@each_way
def test_the_activation_is_rounded_in_every_product(transposed):
    # Else the products would be those of the decoded weight, and no test above could tell.
    stack, layers = make(transposed=transposed)
    x = gaussian(5, IN, seed=9)
    dense = right(stack)[1].clone()
    assert not torch.allclose(x @ dense, x @ right(stack)[1], rtol=1e-2)
    assert torch.allclose(dense.t(), layers[1].weight.clone())


@each_way
def test_readers_meet_the_parameter(transposed):
    stack, layers = make(transposed=transposed, dtype=torch.bfloat16)
    dense = torch.stack([layer.weight.clone() for layer in layers])
    dense = dense.mT.contiguous() if transposed else dense
    assert stack.shape == dense.shape
    assert (stack.dtype, stack.device, stack.ndim, len(stack)) == (
        torch.bfloat16,
        dense.device,
        3,
        E,
    )
    assert stack.size(0) == E
    assert stack.stride() == dense.stride()
    assert stack.numel() == dense.numel()
    assert torch.equal(stack.weight.clone(), dense)
    assert torch.equal(stack[1].float() * 2, dense[1].float() * 2)
    assert torch.equal(stack[:, 3:5] + 0, dense[:, 3:5])
    assert torch.equal(stack.transpose(1, 2).clone(), dense.mT)
    assert torch.equal(stack.weight.flatten(), dense.flatten())
    assert torch.equal(torch.cat(list(stack)), torch.cat(list(dense)))
    assert torch.equal(stack.dequantize(), dense)
    assert torch.allclose(stack.reconstruct().bfloat16(), dense.mT if transposed else dense)
    with pytest.raises(IndexError):
        stack.expert(E)
    with pytest.raises(AttributeError):
        stack.nothing_of_the_kind  # noqa: B018 - reading is what raises


def test_it_cannot_be_written_to():
    stack, _ = make()
    writers = (
        lambda: stack.weight.mul_(2),
        lambda: nn.init.normal_(stack.weight),
        lambda: stack[0].zero_(),
        lambda: stack.weight.copy_(torch.zeros(E, OUT, IN)),
        lambda: setattr(stack, "weight", torch.zeros(E, OUT, IN)),
    )
    for write in writers:
        with pytest.raises(LayerError, match="read-only"):
            write()


@each_way
def test_a_gradient_reaches_the_input(transposed):
    stack, layers = make(transposed=transposed)
    gradients = []
    for product in (lambda x: x @ right(stack)[2], layers[2]):
        x = gaussian(5, IN, seed=9).requires_grad_()
        product(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)


@each_way
def test_autocast_means_what_it_means_for_a_layer(transposed):
    stack, layers = make(transposed=transposed)
    x = gaussian(5, IN, seed=9)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = x @ right(stack)[0], layers[0](x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)


@pytest.mark.parametrize("backend", ["reference", "resident", "low_memory"])
def test_every_back_end_runs_the_experts(backend):
    stack, layers = make()
    for layer in (stack, *layers):
        layer.backend = backend
    x = gaussian(5, IN, seed=9)
    assert torch.equal(linear(x, stack[1]), layers[1](x))
    assert stack.backend == backend
    assert stack.kept_nbytes == layers[1].kept_nbytes
    stack.prepare(torch.float32)
    assert stack.kept_nbytes == E * layers[1].kept_nbytes
    with pytest.raises(KernelError):
        stack.backend = "int8_row"


def test_a_model_switches_its_stacks():
    stack, _ = make(recipe="int8")
    model = nn.ModuleDict({"stack": stack})
    set_backend(model, "int8_row")
    linear(gaussian(5, IN, seed=9), stack[0])
    assert stack.backend == "int8_row"


def test_what_is_kept_follows_the_bytes():
    stack, _ = make()
    other, layers = make(recipe="mxint8+w8a8-r4")
    x = gaussian(5, IN, seed=9)
    linear(x, stack[0])
    fresh = copy.deepcopy(stack)
    assert torch.equal(linear(x, fresh[0]), linear(x, stack[0]))
    assert fresh.expert(0) is not stack.expert(0)
    again = pickle.loads(pickle.dumps(stack))
    assert torch.equal(linear(x, again[0]), linear(x, stack[0]))
    # An offloading hook puts other tensors into the tables behind the layer's back.
    moved = copy.deepcopy(other)
    linear(x, moved[0])
    for name, parameter in list(moved._parameters.items()):
        if parameter is not None:
            moved._parameters[name] = nn.Parameter(parameter.flip(0), requires_grad=False)
    assert torch.equal(linear(x, moved[0]), layers[E - 1](x))


def test_hooks_of_the_stack_see_every_product():
    stack, _ = make()
    seen = []
    stack.register_forward_hook(lambda _, inputs, y: seen.append((inputs[1], y.shape)))
    linear(gaussian(5, IN, seed=9), stack[2])
    torch.bmm(gaussian(E * 2, IN, seed=9).view(E, 2, IN), right(stack))
    assert seen == [(2, (5, OUT)), *((e, (1, 2, OUT)) for e in range(E))]


def test_it_shows_what_it_is():
    stack, _ = make(transposed=True)
    assert repr(stack).startswith("QuantizedExperts(experts=3, transposed=True, in_features=64")
    assert "bits per weight" in repr(stack)
    assert repr(stack[0]).startswith("ExpertWeight(")
    assert stack.packed_shape == (E, OUT, IN)
    assert stack.packed[1].shape == (OUT, IN)
    assert stack.bits_per_weight == 8 * stack.nbytes / (E * OUT * IN)


def test_tensor_parallelism_refuses_a_stack():
    with pytest.raises(KernelError, match="was given a QuantizedExperts"):
        _require_quantized(make()[0])
