"""The table of targets: `TARGETS`, by the names that `--to` takes."""

from loraq.errors import ExportError, unknown
from loraq.exports.comfy import Comfy
from loraq.exports.dense import Dense
from loraq.exports.gguf import Gguf
from loraq.exports.nunchaku import NunchakuLite
from loraq.exports.onnx import Onnx
from loraq.exports.openvino import OpenVino
from loraq.exports.sdnq import Sdnq
from loraq.exports.target import Target
from loraq.exports.torchao import Torchao

#: Every target, the one to try first at the top.
TARGETS: dict[str, type[Target]] = {
    target.about.name: target
    for target in (Sdnq, Gguf, NunchakuLite, Onnx, OpenVino, Torchao, Comfy, Dense)
}


def get_target(name: str) -> type[Target]:
    """Return a target by name.

    Raises:
        ExportError: there is none of this name.
    """
    if name not in TARGETS:
        raise ExportError(
            f"{unknown('target', name, TARGETS)} `loraq export --list` explains them."
        )
    return TARGETS[name]
