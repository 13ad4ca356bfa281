"""The demo's picture: samples, what quantization changed in them, and the error of every row."""

from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.evaluation.demo import DemoResult, DemoRow
from loraq.pages.files import require_place, write_whole

#: Samples of a row that are shown.
SHOWN = 10
#: What differences are multiplied by.
AMPLIFIED = 10
#: What a PNG says that it was made by.
_SOFTWARE = "loraq demo"
_OURS, _OTHERS = "#1f5fd0", "#a9b1bd"


def require_drawable(path: Path, assets: Path) -> None:
    """Make the folder of a picture.

    What is wrong is then known before the minutes of measuring and not after.

    Args:
        path: of the picture.
        assets: folder of what the demo reads.

    Raises:
        LoraqError: matplotlib is not installed, or the file cannot be written.
        CheckpointError: the file would be among those that the demo reads.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LoraqError('The picture needs matplotlib. Run: pip install "loraq[demo]"') from error
    require_place(path, assets, mark=_SOFTWARE.encode())


def draw(result: DemoResult, path: Path) -> None:
    """Write the picture as a PNG, which appears when it is whole.

    Raises:
        LoraqError: matplotlib is not installed, or the file cannot be written.
        CheckpointError: the file would be among those that the demo reads.
    """
    require_drawable(path, result.subject.folder)
    from matplotlib.figure import Figure

    n_rows = len(result.rows)
    figure = Figure(figsize=(14, 0.75 * n_rows + 0.34 * n_rows + 1.4), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[0.75 * n_rows, 0.34 * n_rows + 1.0])
    top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    axes = top.subplots(n_rows, 2, squeeze=False)
    axes[0, 0].set_title("samples", fontsize=9)
    axes[0, 1].set_title(f"|difference| × {AMPLIFIED}", fontsize=9)
    for (left, right), row, images in zip(axes, result.rows, result.images, strict=True):
        for axis, strip in zip((left, right), strips_of(images, result.images[0]), strict=True):
            axis.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_axis_off()
        beside = {"ha": "right", "transform": left.transAxes}
        left.text(-0.02, 0.52, row.label, va="bottom", fontsize=9, fontweight="bold", **beside)
        left.text(-0.02, 0.48, _describe(row), va="top", fontsize=8, **beside)
    _draw_bars(bottom.subplots(1, 1), result.rows[1:])
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": _SOFTWARE})
    write_whole(path, picture.getvalue())


def _describe(row: DemoRow) -> str:
    return " · ".join(
        part for part in (row.recipe, f"{row.bits_per_weight:.2f} bits", row.group) if part
    )


def _draw_bars(axis: Any, rows: tuple[DemoRow, ...]) -> None:
    names = [f"{row.label} · {_describe(row)}" for row in rows]
    places = range(len(rows))
    colours = [_OURS if row.method == "loraq" else _OTHERS for row in rows]
    drawn = axis.barh(places, [row.velocity_error for row in rows], color=colours)
    axis.bar_label(drawn, [f"{row.velocity_error:.4f}" for row in rows], padding=3, fontsize=8)
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("velocity error against the model as trained")
    axis.spines[["top", "right"]].set_visible(False)


def strips_of(images: Tensor, trained: Tensor) -> tuple[Any, Any]:
    """Return the first samples of a row, and how far they are from those of the model as trained.

    Both are strips of bytes, black to white: (h, n·(w + 1) - 1), of colour pictures (…, 3).
    """
    shown = images[:SHOWN]
    difference = (shown - trained[:SHOWN]).abs() * (AMPLIFIED / 2)
    return _strip((shown + 1) / 2), _strip(difference)


def _strip(images: Tensor) -> Any:
    """(n, c, h, w) in [0, 1] to one strip, with a dark line between images."""
    padded = nn.functional.pad(images.clamp(0, 1), (0, 1), value=0.35)
    strip = padded.permute(2, 0, 3, 1).flatten(1, 2)[:, :-1]
    return strip.squeeze(-1).mul(255).round().byte().numpy()
