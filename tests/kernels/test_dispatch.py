"""Which back ends are tried on which device, and what `strict` leaves of them."""

import pytest
import torch

from loraq.errors import KernelError
from loraq.kernels import BACKENDS, LayerSpec, choose, get_backend
from loraq.kernels.dispatch import candidates, prepare
from loraq.kernels.int8_matrix import rows_of, saturates
from loraq.kernels.int8_row import Int8Row
from loraq.packed import PackedWeight
from loraq.scheme import Scheme

CPU = torch.device("cpu")
LOW_MEMORY = get_backend("low_memory")
#: A back end stands in the automatic list of a device only after it was measured there.
AUTOMATIC = {
    "cpu": (Int8Row(weight_error=0.0, keeps_operands=False), LOW_MEMORY),
    "cuda": (LOW_MEMORY,),
    "mps": (LOW_MEMORY,),
    "xpu": (LOW_MEMORY,),
    "meta": (LOW_MEMORY,),
}


@pytest.mark.parametrize("device", AUTOMATIC)
def test_the_automatic_list_of_each_device(device):
    assert candidates("auto", torch.device(device)) == AUTOMATIC[device]
    assert candidates("auto", torch.device(device), strict=False) == AUTOMATIC[device]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_back_end_that_is_asked_for_stands_alone_or_before_the_automatic_list(name):
    assert candidates(name, CPU) == (BACKENDS[name],)
    assert candidates(name, CPU, strict=False) == (BACKENDS[name], *AUTOMATIC["cpu"])


def test_strict_raises_where_the_automatic_choice_would_step_in():
    refused = LayerSpec((Scheme("mxfp4", "mxint8"),), (8, 32), CPU)
    with pytest.raises(KernelError, match="'int8_row' cannot run a layer 8×32 in 'mxfp4'"):
        choose("int8_row", refused)
    assert choose("int8_row", refused, strict=False).name == "low_memory"


def test_a_refusal_of_values_is_strict_too():
    scheme = Scheme("mxfp8_e5m2", "mxfp4")
    wide = torch.full((4, 32), 1.75) * torch.tensor([2.0**-13, 1.75, 2.0**14, 1.0]).repeat(8)
    packed = PackedWeight(scheme, scheme.weight_format.quantize(wide))
    with pytest.raises(KernelError, match="do not fit e4m3 exactly"):
        prepare("fp8_row", packed, torch.float32)
    assert prepare("fp8_row", packed, torch.float32, strict=False).backend.name == "low_memory"


@pytest.mark.skipif(saturates(CPU), reason="int8_row refuses this CPU")
@pytest.mark.parametrize(("error", "runs"), [(0.0, True), (0.03, True), (0.0301, False)])
def test_int8_row_encodes_a_weight_anew_up_to_3_percent(monkeypatch, error, runs):
    scheme = Scheme("int4", "int8")
    packed = PackedWeight(scheme, scheme.weight_format.quantize(torch.ones(8, 64)))
    monkeypatch.setattr(
        "loraq.kernels.int8_row.rows_of", lambda stored: (rows_of(stored)[0], error)
    )
    chosen = prepare("int8_row", packed, torch.float32, strict=False).backend.name
    assert chosen == ("int8_row" if runs else "low_memory")
    # The automatic choice takes a weight only as it is.
    automatic = prepare("auto", packed, torch.float32).backend.name
    assert automatic == "low_memory"
