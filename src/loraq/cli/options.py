"""Options that several commands have, and how their values are read."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from loraq.recipe import Recipe


def recipe_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that make a recipe."""
    options = (
        click.option(
            "--recipe",
            default="default",
            show_default=True,
            help="Name (`loraq formats`), or .toml/.json file.",
        ),
        click.option(
            "--budget",
            help="Bits per weight (5.25), or a 16-bit branch's bytes (r16=32); sets the ranks.",
        ),
        click.option(
            "--allocate",
            "allocation",
            flag_value="greedy",
            help="Share the budget among the layers: the same bytes in all, ranks where they help "
            "most.",
        ),
        click.option("--method", help="Method instead of the recipe's (`loraq methods`)."),
        click.option(
            "--effort",
            metavar="LEVEL",
            help="Level of effort; for method loraq: fast, default or best.",
        ),
        click.option(
            "--rank", type=click.IntRange(1), help="Rank of every branch instead of the recipe's."
        ),
        click.option(
            "--keep",
            metavar="HOW",
            help="How layers are stored that the model's class keeps: int8 or float.",
        ),
        click.option("--seed", type=int, help="Seed instead of the recipe's."),
    )
    for option in reversed(options):
        function = option(function)
    return function


RECIPE_OPTIONS = (
    "recipe",
    "budget",
    "allocation",
    "method",
    "effort",
    "rank",
    "keep",
    "seed",
)

#: For what runs on one device.
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where the work is done: auto (a GPU if there is one), cpu, cuda, cuda:1 or xpu.",
)
#: For what solves all layers of a model, or says how long that takes.
devices_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where the work is done: auto (GPUs if there are any), all (every GPU, a worker for "
    "each), cpu, cuda, cuda:1 or xpu.",
)


workers_option = click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Layers solved at a time; several machines share them by torchrun.",
)


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="config.json or its folder, for a SOURCE without one.",
)


variant_option = click.option(
    "--variant",
    metavar="NAME",
    help="Which copy of the weights in a folder that holds several, such as fp16.",
)


components_option = click.option(
    "--components",
    metavar="all|NAME,…",
    help="What of a pipeline is quantized: names, or all for its denoisers and text encoders. "
    "[default: its denoisers]",
)


#: Dtypes that a whole pipeline may have.
DTYPES = ("float32", "bfloat16", "float16")


def _settings(
    _context: click.Context, _parameter: click.Parameter, pairs: tuple[str, ...]
) -> dict[str, Any]:
    """Read "height=512": a name and a JSON value, or plain text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"'{pair}' is no NAME=VALUE, such as height=512.")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


call_option = click.option(
    "--set",
    "call",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_settings,
    help="Argument of the pipeline's call; may be given several times.",
)


component_option = click.option(
    "--component",
    metavar="NAME",
    help="Which model of a pipeline that has several, such as transformer_2.",
)


def size_option_value(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> int | None:
    """Read a size such as "2GB", "500 MB" or "1GiB"."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?)(i?)B?", text, re.IGNORECASE)
    size = found and round(
        float(found[1]) * (1024 if found[3] else 1000) ** " KMG".index(found[2].upper() or " ")
    )
    if not size:
        raise click.BadParameter(
            f"'{text}' is not a size. Write a number and a unit, such as 2GB or 500MB."
        )
    return size


shard_size_option = click.option(
    "--shard-size",
    "shard_bytes",
    default="2GB",
    show_default=True,
    callback=size_option_value,
    help="Largest file.",
)


overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace a model that is at TARGET."
)


link_option = click.option(
    "--link", is_flag=True, help="Hard-link a pipeline's other components instead of copying them."
)


def stats_option_value(
    _context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]
) -> Path | dict[str, Path] | None:
    """Read a file, or "transformer=FILE" once for each component."""
    if not texts:
        return None
    if len(texts) == 1 and ("=" not in texts[0] or Path(texts[0]).exists()):
        return Path(texts[0])
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or not name or not file or name in found:
            raise click.BadParameter(
                f"'{text}' is no NAME=FILE of another component. Give one file, or NAME=FILE once "
                "for each component."
            )
        found[name] = Path(file)
    return found


def read_recipe(recipe: str, *, rank: int | None = None, **overrides: Any) -> "Recipe":
    """Return the recipe that the options describe."""
    from dataclasses import replace

    from loraq.methods import METHODS
    from loraq.recipe import Recipe

    asked = {key: value for key, value in overrides.items() if value is not None}
    made = replace(Recipe.of(recipe), **asked)
    if rank is not None:  # with a budget too, the recipe says that one of them settles it
        made = made.adjusted(rank=rank, budget=asked.get("budget"))
    if METHODS[made.method].efforts:
        return made
    if "effort" in asked:
        able = ", ".join(name for name, method in METHODS.items() if method.efforts)
        raise click.UsageError(
            f"Method '{made.method}' has no levels of effort. Leave --effort out, or use a method "
            f"that has them ({able})."
        )
    if made.effort != "default":
        click.echo(
            f"Note: method '{made.method}' has no levels of effort, so the recipe's "
            f"'{made.effort}' changes nothing.",
            err=True,
        )
    return made


def split_scale(lora: str) -> tuple[str, float]:
    """Return path and scale of "LORA:SCALE"; a file of that very name is one without a scale."""
    path, colon, scale = lora.rpartition(":")
    try:
        number = float(scale)
    except ValueError:
        return lora, 1.0
    return (path, number) if colon and path and not Path(lora).exists() else (lora, 1.0)
