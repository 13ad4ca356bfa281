"""What every command has: `--json` and `--debug`, errors as one message, exit codes."""

import sys
import warnings
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import click

from loraq.errors import LoraqError, LoraqWarning, show
from loraq.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="loraq")
def main() -> None:
    """Quantize diffusion transformers to 4 bits without any data.

    \b
    loraq plan SOURCE                 what would happen, layer by layer
    loraq quantize SOURCE TARGET      do it
    loraq report TARGET               see what became of it, on one page
    loraq demo                        see it on a small trained transformer, in a clone
    """


def command(function: Callable[..., None]) -> click.Command:
    """Register a command: `--json`, `--debug`, errors as one message, documented exit codes."""

    @wraps(function)
    def run(*, debug: bool, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = partial(_show_warning, warnings.showwarning)
                function(**kwargs)
        except BrokenPipeError:
            raise  # the reader has gone, as in `loraq formats | head`
        except (LoraqError, OSError) as error:
            if debug:
                raise
            click.echo(f"Error: {show(error)}", err=True)
            sys.exit(1)
        except KeyboardInterrupt as interrupt:
            # What came before the work says nothing: whatever an earlier run has left is there.
            click.echo(str(interrupt) or "Interrupted.", err=True)
            sys.exit(130)

    run = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(run)
    run = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document instead of tables."
    )(run)
    name = function.__name__.rstrip("_").replace("_", "-")  # as in `import_`
    return main.command(name=name)(run)


def _show_warning(
    show_others: Callable[..., None], message: Warning, category: type[Warning], *place: Any
) -> None:
    """Show our own warnings as notes; where in the code they come from helps nobody."""
    if issubclass(category, LoraqWarning):
        click.echo(f"Note: {show(message)}", err=True)
    else:
        show_others(message, category, *place)
