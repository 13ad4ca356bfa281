"""`loraq doctor`: what this machine has, what would run where, and whether it computes right."""

import click

from loraq.cli.command import command
from loraq.cli.output import print_json, print_table


@command
def doctor(as_json: bool) -> None:
    """Show devices, versions and the back end of each number format, and test them.

    The test takes some seconds.

    \b
    Example: loraq doctor
    """
    from dataclasses import asdict

    from loraq.doctor import examine, require_healthy

    report = examine()
    if as_json:
        print_json(asdict(report))
    else:
        for title, headings, rows in report.tables():
            click.echo(f"\n{title}")
            print_table(headings, rows)
    require_healthy(report)
