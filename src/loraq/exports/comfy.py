"""Target `comfy`: NVFP4 tensors of ComfyUI under its own names, the branch for its bypass node.

By tensor, for a layer (N, K):

    weight           uint8 (N, K/2)   E2M1, element 2j in the high half of byte j
    weight_scale     E4M3             (N, K/16) filled up to tiles of 128×4, in the order of cuBLAS
    weight_scale_2   fp32             the global scale
    comfy_quant      uint8            JSON that names the format
"""

import json
import re
from pathlib import PurePosixPath

import torch
from torch import Tensor

from loraq.exports.codes import Tiling, e2m1_values, high_first, per_block, split_high_first
from loraq.exports.factors import explain_rounding
from loraq.exports.joined import JoinedSource
from loraq.exports.layer import Head, Layer, Specs, Tensors
from loraq.exports.lora import BranchBeside
from loraq.exports.native import find_native_names, list_classes
from loraq.exports.source import ExportSource
from loraq.exports.target import EXACT_IN_16_BITS, About, BranchFile
from loraq.safetensors.header import TensorSpec

#: A graph of the two nodes that load both files.
WORKFLOW = "workflow.json"
_BRANCH_FILE = BranchFile(
    "branch.safetensors",
    "diffusion_model",
    load='cp "{folder}/branch.safetensors" "$COMFYUI/models/loras/{folder}/"',
    traps=(
        "Without `branch.safetensors` the model runs and is wrong. Its strength is 1.0, always. "
        "The node is `LoraLoaderBypassModelOnly`, never the ordinary LoRA loader: that one merges "
        "the branch into the 4-bit weights and rounds them again, which is worse than having no "
        "branch.",
        "A second bypass node takes the place of the first. Other LoRAs go into the branch "
        "(`loraq export --lora FILE`).",
        "ComfyUI calls the bypass node experimental.",
    ),
)
#: Values that share a block scale; kernels take sizes in multiples of it.
_BLOCK = 16
#: Layers of a block, such as "double_blocks.0.img_attn.qkv".
_IN_A_BLOCK = re.compile(r"[^.]+\.\d+\..+")


def scale_tiling(n: int, groups: int) -> Tiling:
    """Return the order of block scales (n, groups) that fill tiles of 128×4."""
    return Tiling((n // 128, 4, 32, groups // 4, 4), (0, 3, 2, 1, 4))


class Comfy(BranchBeside):
    """Files for `models/diffusion_models` and `models/loras` of ComfyUI, and a workflow."""

    about = About(
        name="comfy",
        loaded_by="ComfyUI (FLUX, Qwen-Image, Wan, Z-Image)",
        holds="NVFP4 in the blocks of a model, out and in multiples of 16; any rank in each layer; "
        "layers that are one there (q, k, v) joined, where they have one format",
        exact=f"{EXACT_IN_16_BITS}. Joined branches stand side by side, their ranks added up",
        activations="NVFP4 by ComfyUI's own rule on Blackwell, where the recipe asks for 4 bits; "
        "16 bits elsewhere",
        verified="every layer and a whole model (FLUX) by comfy-kitchen's eager layout on a CPU; "
        "names and joins by diffusers' converters of original files",
        unverified="ComfyUI itself, which is no package, its bypass node, and the kernels",
        load="COMFYUI=ComfyUI  # its folder; then drag {folder}/workflow.json into its window\n"
        'mkdir -p "$COMFYUI/models/diffusion_models/{folder}" "$COMFYUI/models/loras/{folder}"\n'
        'cp "{folder}/model.safetensors" "$COMFYUI/models/diffusion_models/{folder}/"',
        branch_file=_BRANCH_FILE,
    )
    one_file = "model.safetensors"

    @classmethod
    def see(cls, source: ExportSource) -> ExportSource:
        """Return the source under ComfyUI's names; its class is one that `targets.toml` has."""
        names = [base.__name__ for base in type(source.model).__mro__]
        model_class = next(name for name in names if name in list_classes())
        weights = [head.weight_name for head in source.heads]
        return JoinedSource.of(
            source, find_native_names(model_class, [*source.list_kept(), *weights])
        )

    def refuses(self, head: Head) -> str:
        """Return why a layer is dense."""
        if head.misfit:
            return head.misfit
        if head.scheme.weight != "nvfp4":
            return f"ComfyUI runs NVFP4 weights here, and this is {head.scheme.weight}"
        if not _IN_A_BLOCK.fullmatch(head.name):
            return "ComfyUI tells models apart by the sizes of layers outside of the blocks"
        return ""

    def explain_rounding(self, head: Head) -> str:
        """Return what of a branch is rounded."""
        reasons = (explain_rounding(part, self.job.new_dtype) for part in head.parts)
        return next(filter(None, reasons), "")

    def specs(self, head: Head) -> Specs:
        """Return the tensors of a layer."""
        n, k = head.shape
        return {
            f"{head.name}.weight": TensorSpec("U8", (n, k // 2)),
            f"{head.name}.weight_scale": TensorSpec("F8_E4M3", _tiled(n, k // _BLOCK)),
            f"{head.name}.weight_scale_2": TensorSpec("F32", ()),
            f"{head.name}.comfy_quant": TensorSpec("U8", (len(_describe(head)),)),
        }

    def main_tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Return codes and scales."""
        head, scale = layer.head, layer.block_scale
        (n, groups), tiled = scale.shape, _tiled(*scale.shape)
        filled = torch.zeros(tiled, dtype=torch.uint8)
        filled[:n, :groups] = scale
        laid = scale_tiling(*tiled).lay(filled).view(tiled)
        return {
            f"{head.name}.weight": high_first(layer.main.packed),
            f"{head.name}.weight_scale": laid.view(torch.float8_e4m3fn),
            f"{head.name}.weight_scale_2": layer.global_scale,
            f"{head.name}.comfy_quant": torch.frombuffer(
                bytearray(_describe(head)), dtype=torch.uint8
            ),
        }

    def decode_main(self, tensors: Tensors, head: Head) -> Tensor:
        """Return E2M1 · (block scale · global scale)."""
        (n, k), name = head.shape, head.name
        laid = tensors[f"{name}.weight_scale"]
        tiled = scale_tiling(*laid.shape).gather(laid.view(torch.uint8)).view(laid.shape)
        scale = tiled[:n, : k // _BLOCK].contiguous().view(torch.float8_e4m3fn).float()
        values = e2m1_values(split_high_first(tensors[f"{name}.weight"]))
        return per_block(values, scale * tensors[f"{name}.weight_scale_2"])

    def notes(self) -> list[str]:
        """Return what joined branches cost."""
        joined = [head for head in self.held if len(head.parts) > 1 and head.rank]
        if not joined:
            return []
        return [
            f"{len(joined)} layers are joined of several there, and their branches stand side by "
            "side: the LoRA file holds zeros between them."
        ]

    def texts(self, folder: str) -> dict[str, str]:
        """Return the workflow: the model, and the branch on it."""
        place = PurePosixPath(folder)
        model = {"unet_name": f"{place / self.one_file}", "weight_dtype": "default"}
        nodes = {"1": {"class_type": "UNETLoader", "inputs": model}}
        if self.branch_file:
            branch = {
                "model": ["1", 0],
                "lora_name": f"{place / self.branch_file.name}",
                "strength_model": 1.0,
            }
            nodes["2"] = {"class_type": "LoraLoaderBypassModelOnly", "inputs": branch}
        return {WORKFLOW: json.dumps(nodes, indent=2) + "\n"}


def _describe(head: Head) -> bytes:
    """Return what ComfyUI reads of a layer's format."""
    text: dict[str, object] = {"format": "nvfp4"}
    if head.scheme.activation == "bf16":
        text["full_precision_matrix_mult"] = True
    return json.dumps(text).encode()


def _tiled(n: int, groups: int) -> tuple[int, int]:
    """Return the shape of block scales that fill their tiles."""
    return -(-n // 128) * 128, -(-groups // 4) * 4
