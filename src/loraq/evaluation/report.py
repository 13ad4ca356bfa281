"""Draw the demo's report: samples side by side with their numbers, and the error of every layer."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

from loraq.checkpoint.apart import require_apart
from loraq.checkpoint.partial import atomic_file, explain_refusals
from loraq.disk import write_file
from loraq.errors import LoraqError
from loraq.evaluation.demo import DemoResult
from loraq.evaluation.digits import assets_folder
from loraq.regular_file import open_regular

_SHOWN = 10
#: What a PNG says that it was made by.
_SOFTWARE = "loraq demo"


def require_drawable(path: Path) -> None:
    """Make the folder of a report.

    What is wrong is then known before the minutes of measuring and not after.

    Raises:
        LoraqError: matplotlib is not installed, or the file cannot be written.
        CheckpointError: the file would be among those that the demo reads.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LoraqError('The report needs matplotlib. Run: pip install "loraq[demo]"') from error
    require_apart(path, assets_folder())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoraqError(f"Cannot write '{path}': {error}. Choose another folder.") from error
    if path.is_dir() or path.is_symlink() or not os.access(path.parent, os.W_OK):
        raise LoraqError(
            f"Cannot write '{path}': it is a folder or a link, or its folder is read-only. Choose "
            "another folder."
        )
    if path.exists() and not _is_report(path):
        raise LoraqError(
            f"Will not replace '{path}': the demo has not drawn it. Choose another folder."
        )


def _is_report(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return _SOFTWARE.encode() in file.read(1000)
    except OSError:
        return False


def draw(result: DemoResult, path: Path) -> None:
    """Write the report as a PNG, which appears when it is whole.

    Raises:
        LoraqError: matplotlib is not installed, or the file cannot be written.
        CheckpointError: the file would be among those that the demo reads.
    """
    require_drawable(path)
    from matplotlib.figure import Figure

    strips = [("as trained", "bf16", result.images["as trained"])]
    for row in result.rows[1:]:
        bits, velocity = (
            f"{row.bits_per_weight:.2f} bits",
            f"velocity error {row.velocity_error:.4f}",
        )
        text = f"{row.recipe} · {bits} · {velocity} · {row.psnr_db:.1f} dB"
        strips.append(
            (row.label.removesuffix(" ★"), text, result.images[f"{row.recipe} {row.label}"])
        )

    figure = Figure(figsize=(14, 0.8 * len(strips) + 5), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[0.8 * len(strips), 5])
    top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    axes = top.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, (label, text, images) in zip(axes, strips, strict=True):
        axis.imshow(_strip(images[:_SHOWN]), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_axis_off()
        axis.text(-2, 4, label, ha="right", va="bottom", fontsize=9, fontweight="bold")
        axis.text(-2, 4.5, text, ha="right", va="top", fontsize=8)
    _draw_errors(bottom.subplots(1, 1), result)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": _SOFTWARE})
    with atomic_file(path) as partial, explain_refusals(path):
        write_file(partial, picture.getvalue())


def _draw_errors(axis: Any, result: DemoResult) -> None:
    """Draw a line for each contender of the weight-only group.

    The other groups have the same weights within noise.
    """
    for row in result.rows:
        errors = result.layer_errors.get(f"{row.recipe} {row.label}")
        if row.group == "weight-only" and errors is not None:
            axis.plot(
                errors,
                marker=".",
                linewidth=1,
                label=f"{row.label} ({row.bits_per_weight:.2f} bits)",
            )
    axis.set_xlabel("layer, in the order of the model")
    axis.set_ylabel("relative weight error")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2)


def _strip(images: Tensor) -> Any:
    """(n, 1, h, w) to one picture of (h, n·(w + 1)), with a white line between images."""
    padded = images.new_ones((len(images), images.shape[2], images.shape[3] + 1))
    padded[:, :, :-1] = images[:, 0]
    return padded.transpose(0, 1).flatten(1).numpy()
