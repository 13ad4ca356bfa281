"""`loraq demo`: the whole job on the small trained transformer that ships with loraq."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraq.cli.command import command
from loraq.cli.options import device_option
from loraq.cli.output import print_json, print_table

if TYPE_CHECKING:
    from loraq.evaluation.demo import DemoRow


@command
@click.option(
    "--out",
    default="demo",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for the report.",
)
@click.option(
    "--images", default=40, show_default=True, type=click.IntRange(10), help="Samples for each row."
)
@device_option
@click.option(
    "--workers",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    help="Layers solved at a time.",
)
def demo(out: Path, images: int, device: str, workers: int, as_json: bool) -> None:
    """Quantize a small trained transformer in every way at equal bytes, and measure.

    \b
    Example: loraq demo
    """
    from loraq.evaluation.demo import run
    from loraq.evaluation.report import draw, require_drawable

    require_drawable(out / "report.png")
    result = run(
        n_images=images,
        device=device,
        workers=workers,
        progress=lambda line: click.echo(line, err=True),
    )
    draw(result, out / "report.png")
    if as_json:
        print_json(
            {
                "rows": [row.to_record() for row in result.rows],
                "report": str(out / "report.png"),
            }
        )
        return
    _print_demo(result.rows)
    click.echo(f"Report: {out / 'report.png'}")


def _print_demo(rows: "tuple[DemoRow, ...]") -> None:
    headings = (
        "",
        "recipe",
        "KiB",
        "bits",
        "weight err",
        "velocity err",
        "PSNR dB",
        "judge",
        "Fréchet",
        "s",
    )
    groups: dict[str, list[DemoRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    for group, members in groups.items():
        click.echo(f"\n{group}")
        table = []
        for row in members:
            quality = (f"{row.weight_error:.4f}", f"{row.velocity_error:.4f}", f"{row.psnr_db:.1f}")
            sanity = (f"{row.accuracy:.3f}", f"{row.frechet:.2f}")
            size = (f"{row.nbytes / 1024:.0f}", f"{row.bits_per_weight:.2f}")
            table.append((row.label, row.recipe, *size, *quality, *sanity, f"{row.seconds:.0f}"))
        print_table(headings, table)
        _print_winners(members)
    click.echo(
        "\nVelocity error is the figure to read: one forward on noised real images against the "
        "model as trained."
    )
    click.echo(
        "Judge accuracy and Fréchet distance are sanity checks: they cannot see differences at 4 "
        "bits."
    )


def _print_winners(rows: "list[DemoRow]") -> None:
    """Say who has the best of each column among the rows of one size, also when it is not LoRaQ."""
    if len(rows) < 2:
        return
    best = {
        "weight error": min(rows, key=lambda row: row.weight_error),
        "velocity error": min(rows, key=lambda row: row.velocity_error),
        "PSNR": max(rows, key=lambda row: row.psnr_db),
    }
    click.echo("Best " + ", ".join(f"{column}: {row.label}" for column, row in best.items()) + ".")
