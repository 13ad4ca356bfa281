"""A weight decoded on demand reads like a tensor, and every way to write to it raises."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from loraq.dense import DenseWeight
from loraq.errors import LayerError

VALUES = torch.linspace(-1, 1, 32).view(8, 4)


@pytest.fixture
def decoded() -> list[int]:
    """How often the numbers were made."""
    return []


@pytest.fixture
def weight(decoded) -> DenseWeight:
    def decode() -> torch.Tensor:
        decoded.append(1)
        return VALUES.clone()

    return DenseWeight(decode, (8, 4), torch.float32, torch.device("cpu"))


def test_what_a_tensor_is_costs_nothing(weight, decoded):
    assert weight.dtype == torch.float32
    assert weight.shape == weight.data.shape == weight.detach().size() == (8, 4)
    assert weight.device == torch.device("cpu")
    assert weight.is_floating_point()
    assert weight.numel() == 32
    assert weight.ndim == 2
    assert isinstance(weight, torch.Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert not decoded


READERS = {
    "sum": lambda w: w.sum(),
    "product": lambda w: linear(torch.ones(2, 4), w),
    "cat": lambda w: torch.cat([w, w]),
    "view": lambda w: w.t().flatten() + 0,
    "slice of data": lambda w: w.data[1:3] * 1,
    "qr": lambda w: torch.linalg.qr(w)[1],
    "view of another tensor": lambda w: torch.broadcast_tensors(w, torch.ones(4))[1],
    "cast": lambda w: w.to(torch.bfloat16),
    "clone": lambda w: w.clone(),
    "deepcopy": copy.deepcopy,
    "tolist": lambda w: torch.tensor(w.tolist()),
    "numpy": lambda w: torch.tensor(np.asarray(w)),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_readers_get_ordinary_tensors_with_the_numbers(weight, read, inference):
    with torch.inference_mode(inference):
        found, wanted = read(weight), read(VALUES)
    assert type(found) is type(wanted)
    assert torch.equal(found, wanted) if isinstance(found, torch.Tensor) else found == wanted


def test_gradients_flow_through_it_to_other_tensors(weight):
    x, same = torch.ones(2, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    linear(x, weight).square().sum().backward()
    linear(same, VALUES).square().sum().backward()
    assert torch.equal(x.grad, same.grad)


def test_it_can_be_copied_into_a_parameter_and_stored(weight):
    layer = nn.Linear(4, 8, bias=False)
    layer.load_state_dict({"weight": weight})
    assert type(layer.weight) is nn.Parameter
    assert torch.equal(layer.weight, VALUES)
    stream = io.BytesIO()
    torch.save({"weight": weight}, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=True)["weight"], VALUES)


WRITERS = {
    "in place": lambda w: w.add_(1),
    "of its data": lambda w: w.data.zero_(),
    "augmented": lambda w: w.__isub__(1),
    "item": lambda w: w.__setitem__(0, 1.0),
    "slice": lambda w: w[0].zero_(),
    "slice of data": lambda w: w.data.__setitem__(slice(2), 0.0),
    "transposed": lambda w: w.t().mul_(2),
    "chunk": lambda w: w.chunk(2)[0].fill_(0),
    "detached": lambda w: w.detach().copy_(VALUES),
    "data assigned": lambda w: setattr(w, "data", VALUES),
    "out": lambda w: torch.add(VALUES, VALUES, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "initialisation": lambda w: nn.init.xavier_uniform_(w),
    "activation": lambda w: torch.nn.functional.relu(w, inplace=True),
    "gradient": lambda w: w.requires_grad_(),
    "gradient assigned": lambda w: setattr(w, "requires_grad", True),
    "parameter": lambda w: nn.Parameter(w),
    "shared memory": lambda w: w.share_memory_(),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_writers_are_refused(weight, write, inference):
    with torch.inference_mode(inference), pytest.raises(LayerError, match=r"read-only.*clone"):
        write(weight)
    assert torch.equal(weight, VALUES)


def test_it_shows_its_numbers(weight):
    assert repr(weight).startswith("DenseWeight(tensor([[-1.0000")


def test_freezing_it_is_no_writing(weight):
    assert weight.requires_grad_(False) is weight
