"""`torchao`: a whole model by diffusers' loader, torchao's tensors and PEFT."""

import torch

import loraq
from loraq.integrations.diffusers import _quiet_diffusers
from tests.exports.models import MODELS, distance, exact_output, output, save_quantized

RECIPE = {"scheme": "nvfp4-a16+bf16-r16", "rules": [{"match": "*single*", "branch": {"rank": 8}}]}


def test_a_whole_flux_is_the_exact_weight_only_forward(tmp_path):
    model = save_quantized("flux", RECIPE, tmp_path / "quantized")
    report = loraq.export(
        *(tmp_path / "quantized", tmp_path / "out"),
        **{"to": "torchao", "shard_bytes": 200_000, "progress": False},
    )
    assert report.counts["exact"] == len(report.layers)
    assert len(list((tmp_path / "out").glob("diffusion*.safetensors"))) > 2
    with _quiet_diffusers() as diffusers:
        kind = getattr(diffusers, MODELS["flux"].class_name)
        loaded = kind.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    weight = loaded.get_submodule(report.layers[0].name).weight
    assert type(weight).__name__ == "NVFP4Tensor"
    without = output(loaded, "flux")
    loaded.load_lora_adapter(
        str(tmp_path / "out/branch.safetensors"), prefix="transformer", adapter_name="loraq"
    )
    wanted = exact_output(model, "flux")
    assert distance(output(loaded, "flux"), wanted) < 1e-6
    assert distance(without, wanted) > 1e-2
