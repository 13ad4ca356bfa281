"""`loraq report`: one page about a quantized folder."""

from pathlib import Path

import click

from loraq.cli.command import command
from loraq.cli.output import print_json
from loraq.errors import show


@command
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The page to write.  [default: PATH.report.html]",
)
def report(path: Path, out: Path | None, as_json: bool) -> None:
    """Write a page about the quantized folder PATH: one HTML file that opens anywhere.

    It shows the error of each layer by depth and kind, what takes the bytes, what was kept and why,
    the worst layers, and the plan against the result; of a pipeline each quantized model. It is
    made of the manifest and of headers, and does not read the weights.

    \b
    Example: loraq report out
    """
    from loraq.pages.report import page_beside, summarize, write_report

    place = page_beside(path) if out is None else out
    models = write_report(path, place)
    if as_json:
        print_json(
            {
                "report": str(place),
                "models": {model.component: summarize(model) for model in models},
            }
        )
        return
    click.echo(f"Report: {show(place)}")
