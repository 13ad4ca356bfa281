"""`loraq demo`: the whole job on a small trained transformer."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraq.cli.command import command
from loraq.cli.options import devices_option
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
@click.option("--all", "every", is_flag=True, help="Measure every row, in every format: minutes.")
@click.option(
    "--emoji",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the emoji model, benchmarks/assets/emoji of a checkout, which draws in colour; "
    "else the digits model of a clone.",
)
@click.option(
    "--images",
    type=click.IntRange(10),
    help="Samples for each row.  [default: 20, of the emoji model 10]",
)
@devices_option
@click.option(
    "--workers",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    help="Layers solved at a time.",
)
def demo(  # noqa: PLR0913 - one argument for each option
    out: Path,
    every: bool,
    emoji: Path | None,
    images: int | None,
    device: str,
    workers: int,
    as_json: bool,
) -> None:
    """Quantize a small trained transformer by LoRaQ and its rivals at equal bytes, and measure.

    Weights have 4 bits and activations 16, which is what runs unless somebody asks for less. The
    rival is SVDQuant with LoRaQ's formats, bytes and statistics; it alternates 20 times, and 100
    times with --all.

    \b
    Example: loraq demo --emoji benchmarks/assets/emoji
    """
    from loraq.evaluation import digits
    from loraq.evaluation.demo import run
    from loraq.evaluation.emoji import Emoji
    from loraq.evaluation.page import require_page, write_page
    from loraq.evaluation.picture import draw, require_drawable

    subject = Emoji(emoji).subject() if emoji else digits.subject()
    picture, page = out / "report.png", out / "report.html"
    require_drawable(picture, subject.folder)
    require_page(page, subject.folder)
    result = run(
        subject,
        every=every,
        effort="default" if every else "fast",
        n_images=images,
        device=device,
        workers=workers,
        progress=lambda line: click.echo(line, err=True),
    )
    draw(result, picture)
    write_page(result, page)
    if as_json:
        print_json(
            {
                "rows": [row.to_record() for row in result.rows],
                "report": str(page),
                "picture": str(picture),
            }
        )
        return
    print_demo(result.rows)
    click.echo(f"Report: {page}, {picture}")


def print_demo(rows: "tuple[DemoRow, ...]") -> None:
    """Print the rows by their group, and who is best in each."""
    headings = (
        "",
        "recipe",
        "KiB",
        "bits",
        "memory KiB",
        "weight err",
        "velocity err",
        "PSNR dB",
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
            size = (f"{row.nbytes / 1024:.0f}", f"{row.bits_per_weight:.2f}")
            memory, seconds = f"{row.memory / 1024:.0f}", f"{row.seconds:.0f}"
            table.append((row.label, row.recipe, *size, memory, *quality, seconds))
        print_table(headings, table)
        _print_winners(members)
    click.echo(
        "\nVelocity error is the figure to read: one forward on noised real images against the "
        "model as trained."
    )
    read = [row.accuracy for row in rows if row.accuracy is not None]
    if read:
        click.echo(
            f"The judge reads at least {100 * min(read):.0f} % of every row's samples correctly; "
            "it cannot see more at 4 bits."
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
