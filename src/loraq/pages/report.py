"""`loraq report`: what became of a quantized model, on one page."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraq.checkpoint.summary import describe, nbytes_of
from loraq.errors import show
from loraq.figures import number, size_of
from loraq.pages.contents import (
    Kept,
    Kind,
    Model,
    group_kinds,
    read_models,
)
from loraq.pages.files import require_place, write_whole
from loraq.pages.frame import (
    Bar,
    Strip,
    bars,
    document,
    footer,
    key,
    stack,
    strips,
    table,
    tiles,
)
from loraq.pages.markup import Content, Markup, join, tag

#: Of the layers with the largest errors, and of lists that may be long.
_WORST, _SHOWN = 8, 12


def page_beside(folder: Path) -> Path:
    """Return the file beside a quantized folder that its page goes to."""
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}.report.html")


def write_report(folder: Path, path: Path) -> list[Model]:
    """Write the page of a quantized folder, a model's or a pipeline's.

    Of the weights only headers are read: whether they are whole, `loraq inspect` says.

    Args:
        folder: what is described.
        path: the file to make; an older page is replaced.

    Returns:
        What was found, by model.

    Raises:
        CheckpointError: the folder is not a quantized one, or the page would be in it.
        LoraqError: the page cannot be written, or the library of a model is not installed.
        RecipeError, SchemeError: the recipe of a model is not valid.
    """
    require_place(path, folder)
    models = read_models(folder)
    write_whole(path, draw_report(folder.absolute().name, models).encode())
    return models


def draw_report(name: str, models: list[Model]) -> str:
    """Return the page of models that were read, under a name."""
    title = f"{show(name)}: quantized by loraq"
    classes = ", ".join(dict.fromkeys(each.class_name for each in models if each.class_name))
    head = [tag("h1", name), tag("p", _lead(classes, models), class_="lead")]
    parts = [_draw_model(model) for model in models]
    if len(models) > 1:
        head += [_tiles(models)]
        head.append(
            tag("nav", *(tag("a", each.component, href=f"#{each.component}") for each in models))
        )
        parts = [
            join(tag("h2", each.component, class_="part", id=each.component), part)
            for each, part in zip(models, parts, strict=True)
        ]
    last = footer(
        "Errors are ‖W − Ŵ‖ / ‖W‖ of each weight, as they were noted when it was made. Written by ",
        tag("code", "loraq report"),
        ".",
    )
    return document(title, *head, *parts, last)


def summarize(model: Model) -> dict[str, Any]:
    """Return the figures of a model's page, by name."""
    return {
        "class": model.class_name,
        "layers": len(model.made),
        "bits_per_weight": model.bits_per_weight,
        "mean_relative_error": model.mean_error,
        "worst": {name: model.errors[name] for name in model.worst(_WORST)},
        "nbytes": dict(model.split_bytes()),
        "kept": [
            {"reason": kept.reason, "stored": kept.stored, "layers": kept.n_layers}
            for kept in model.kept()
        ],
        "differs_from_plan": [each._asdict() for each in model.differences()],
    }


def _lead(classes: str, models: list[Model]) -> str:
    recipes = [each.manifest.recipe for each in models if each.manifest.recipe is not None]
    methods = {f"method {each.get('method')}, effort {each.get('effort')}" for each in recipes}
    return " · ".join([*([classes] if classes else []), *sorted(methods)])


def _tiles(models: list[Model]) -> Markup:
    nbytes = sum(model.nbytes for model in models)
    parameters = sum(model.parameters for model in models)
    errors = [error for model in models for error in model.made_errors]
    n_made = sum(len(model.made) for model in models)
    n_kept = sum(kept.n_layers for model in models for kept in model.kept())
    scratch = max(model.scratch for model in models)
    figures = [
        (size_of(nbytes), f"all tensors; {size_of(2 * parameters)} in 16 bits"),
        (f"{8 * nbytes / max(1, parameters):.2f} bits", "a parameter, everything counted"),
        (size_of(nbytes + scratch), "when it runs: packed, and one layer at a time decoded"),
        (str(n_made), f"layers quantized, {n_kept} kept"),
    ]
    if errors:
        mean = sum(errors) / len(errors)
        figures.insert(2, (number(mean), f"mean relative error; largest {number(max(errors))}"))
    return tiles(*figures)


def _draw_model(model: Model) -> Markup:
    kinds = group_kinds(list(model.made))
    return join(
        _tiles([model]),
        _section(
            "Error by depth and kind",
            "One row for each kind of layer, one column for each block from the first to the last, "
            "all on one scale. The numbers are mean and largest.",
            _panel(strips(map(lambda kind: _strip(model, kind), kinds))),
        )
        if model.errors
        else None,
        _section(
            "Largest errors",
            None,
            _panel(bars([("", [_worst_bar(model, name) for name in model.worst(_WORST)])])),
        )
        if model.errors
        else None,
        _draw_bytes(model),
        _draw_kept(model.kept()),
        _draw_plan(model),
        _draw_recipes(model),
        tag(
            "details",
            tag("summary", f"All {len(model.manifest.layers)} quantized layers"),
            _panel(
                table(
                    ("layer", "#error", "out×in", "stored as", "#size"),
                    [_layer_row(model, name) for name in model.manifest.layers],
                )
            ),
        ),
    )


def _section(heading: str, text: Content, *content: Content) -> Markup:
    return join(tag("h2", heading), tag("p", text, class_="note") if text else None, *content)


def _panel(*content: Content) -> Markup:
    return tag("div", *content, class_="panel")


def _strip(model: Model, kind: Kind) -> Strip:
    known = {depth: name for depth, name in kind.layers.items() if name in model.errors}
    errors = [model.errors[name] for name in known.values()]
    cells = [(name, model.errors.get(name)) for name in kind.layers.values()]
    mean = sum(errors) / len(errors) if errors else None
    largest = tag("small", f" {number(max(errors))}") if len(errors) > 1 else None
    return Strip(tag("code", kind.name), cells, join(number(mean), largest))


def _worst_bar(model: Model, name: str) -> Bar:
    error = model.errors[name]
    return Bar(tag("code", name), error, number(error), True)


def _layer_row(model: Model, name: str) -> list[Content]:
    layer = model.manifest.layers[name]
    stored = describe(layer.scheme) + (" (kept)" if layer.is_kept else "")
    return [
        tag("code", name),
        number(model.errors.get(name)),
        "×".join(map(str, layer.shape)),
        stored,
        size_of(nbytes_of(layer)),
    ]


def _draw_bytes(model: Model) -> Markup:
    parts = model.split_bytes()
    rows = [
        (key(i, name), size_of(nbytes), f"{100 * nbytes / max(1, model.nbytes):.1f} %")
        for i, (name, nbytes) in enumerate(parts)
    ]
    before = 2 * model.parameters
    ratio = f"{before / max(1, model.nbytes):.2f} times smaller than in 16 bits."
    return _section(
        "Bytes",
        f"{size_of(model.nbytes)} in all, {ratio}",
        _panel(
            stack(parts, model.nbytes),
            table(("part", "#size", "#share"), rows),
        ),
    )


def _draw_kept(kept: list[Kept]) -> Markup | None:
    if not kept:
        return None
    rows = [
        (
            each.reason or "a rule of the recipe",
            each.stored,
            str(each.n_layers),
            size_of(each.nbytes),
            _name_kinds(each.kinds),
        )
        for each in kept
    ]
    return _section(
        "Kept, and why",
        "What the rules of the class or the recipe keep out of the 4-bit scheme.",
        _panel(table(("reason", "stored in", "#layers", "#size", "which"), rows)),
    )


def _name_kinds(kinds: Iterable[Kind]) -> Markup:
    kinds = list(kinds)
    shown = [
        join(tag("code", kind.name), f" ×{len(kind.layers)}" if len(kind.layers) > 1 else None)
        for kind in kinds[:_SHOWN]
    ]
    more = [join(f"and {len(kinds) - _SHOWN} more")] if len(kinds) > _SHOWN else []
    return tag("span", *(part for each in (*shown, *more) for part in (each, Markup("<br>"))))


def _draw_plan(model: Model) -> Markup:
    if model.plan is None:
        return _section(
            "Plan against result",
            "The folder has no configuration that names a class, so there is nothing to plan "
            "again: which layers stayed floats is not known.",
        )
    differences = model.differences()
    planned = sum(job.nbytes for job in model.plan.quantized)
    stored = sum(map(nbytes_of, model.manifest.layers.values()))
    n_made = len(model.plan.quantized) - len(model.plan.kept_in_8_bits)
    n_kept = len(model.manifest.layers) - len(model.made)
    rows = [
        ("layers quantized", str(n_made), str(len(model.made))),
        ("layers kept in 8 bits", str(len(model.plan.kept_in_8_bits)), str(n_kept)),
        ("bytes of these", size_of(planned), size_of(stored)),
        (
            "bits per weight",
            f"{model.plan.bits_per_weight:.3f}",
            f"{model.bits_per_weight:.3f}",
        ),
    ]
    if not differences:
        return _section(
            "Plan against result",
            "Every layer is stored as its recipe plans it.",
            _panel(table(("", "#planned", "#stored"), rows)),
        )
    listed = table(
        ("layer", "planned", "stored"),
        [(tag("code", each.name), each.planned, each.stored) for each in differences],
    )
    return _section(
        "Plan against result",
        f"{len(differences)} layers are stored otherwise than the recipe plans them one by one: an "
        "allocation moves ranks, and appended LoRAs add some.",
        _panel(table(("", "#planned", "#stored"), rows)),
        tag("details", tag("summary", f"The {len(differences)} layers"), _panel(listed)),
    )


def _draw_recipes(model: Model) -> Markup | None:
    rows: list[tuple[Content, ...]] = []
    for recipe in model.manifest.recipes:
        for name, value in recipe.items():
            if name != "scheme" and value not in ("", None, [], {}):
                rows.append((name, tag("code", str(value))))
    if not rows:
        return None
    used: dict[str, int] = {}
    for layer in model.made.values():
        text = describe(layer.scheme)
        used[text] = used.get(text, 0) + 1
    schemes = [Bar(text, count, str(count), True) for text, count in used.items()]
    schemes.sort(key=lambda bar: -bar.value)
    return _section(
        "Recipe",
        "What asked for this, and the schemes that came of it.",
        _panel(bars([("", schemes[:_SHOWN])])),
        _panel(table(("setting", "value"), rows)),
    )
