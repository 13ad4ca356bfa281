"""Every command and call that writes leaves alone what it reads, however the two overlap.

A new one that writes needs rows here, and one that does not a place in the list of those.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import isfunction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

import loraq
from loraq.checkpoint.pretrained import attach_methods
from loraq.cli import main
from loraq.errors import CheckpointError, LoraqError
from loraq.evaluation import digits
from loraq.evaluation.demo import DemoResult
from loraq.evaluation.page import write_page
from loraq.evaluation.picture import draw
from loraq.stats import ActivationStats
from tests.folders import files_of

pytest.importorskip("diffusers")

#: Ways in which a target can touch what is read.
SAME, PARENT, CHILD = "itself", "its parent", "in it"
ALIAS, PARENT_ALIAS, LINKED = "a link to it", "a link to its parent", "what a link leads to"
ANY = (SAME, PARENT, CHILD, ALIAS, PARENT_ALIAS, LINKED)
#: What is in memory may go back to where it came from, or beside it.
OF_MEMORY = (PARENT, PARENT_ALIAS, LINKED)
#: The picture is one file in the folder that is named.
OF_PICTURE = (SAME, CHILD, ALIAS)

WRITING = {
    "commands": {
        "quantize",
        "stats",
        "absorb-lora",
        "append-lora",
        "remove-lora",
        "demo",
        "export",
        "report",
        "import",
        "evaluate",
    },
    "calls": {
        "absorb_lora",
        "append_lora",
        "collect_pipeline_stats",
        "collect_stats",
        "export",
        "import_checkpoint",
        "quantize_checkpoint",
        "remove_lora",
        "save",
        "save_stats",
    },
}
READING = {
    "commands": {"plan", "inspect", "compare", "formats", "methods", "doctor"},
    "calls": {
        "dequantize_",
        "get_format",
        "load",
        "load_into",
        "load_stats",
        "plan_export",
        "plan_model",
        "quantize",
        "quantize_",
        "quantize_weight",
        "set_activations",
        "set_backend",
    },
}

NAMES = {"weights": "model.safetensors", "lora": "adapter_model.safetensors"}
RECIPE = "mxfp4-a16"
IN_PLACE: dict[str, Any] = {"overwrite": True, "progress": False}


def fill(folder: Path) -> Path:
    """Make a folder that passes for whatever is read: weights, pipeline, LoRA, statistics."""
    (folder / "transformer").mkdir(parents=True)
    for name in ("config.json", "transformer/config.json"):
        (folder / name).write_text("{}")
    (folder / "model_index.json").write_text('{"transformer": ["diffusers", "PixArt"]}')
    save_file({"layer.weight": torch.ones(32, 64)}, folder / "transformer/model.safetensors")
    save_file({"layer.weight": torch.ones(32, 64)}, folder / NAMES["lora"])
    loraq.save_stats({"layer": ActivationStats(1, torch.eye(64))}, folder / "stats.safetensors")
    (folder / "recipe.toml").write_text('[scheme]\nweight = "mxfp4"\n')
    (folder / "prompts.txt").write_text("a red fox\n")
    return folder


class Model(nn.Module):
    """As much of a model of diffusers as saving looks at."""

    def __init__(self, origin: Path) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 32)
        self.config = SimpleNamespace(_name_or_path=str(origin))

    def save_pretrained(self, *_: object) -> None:
        raise AssertionError("what is attached takes its place")


def quantized(origin: Path) -> Any:
    model = Model(origin)
    loraq.quantize_(model, RECIPE, progress=False)
    attach_methods(model)
    return model


def cli(*words: object) -> None:
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exit_code != 0:
        raise CheckpointError(result.stderr)


@dataclass(frozen=True)
class Writer:
    """One thing that is read by one thing that writes."""

    #: A command or a call, and what it reads.
    name: str
    #: Writes to the second path what is made from the first; the third has all that is apart.
    write: Callable[[Path, Path, Path], object]
    #: What is read in the folder that `fill` makes; "" for all of it.
    reads: str = ""
    kinds: tuple[str, ...] = ANY

    def __str__(self) -> str:
        return self.name


def absorbs(**given: Path) -> None:
    loraq.absorb_lora(**given, **IN_PLACE)  # type: ignore[arg-type]


def evaluates(a: Path, b: Path, images: Path, prompts: Path) -> None:
    cli("evaluate", a, b, "--prompts", prompts, "--images", images, "--no-lpips")


WRITERS = [
    Writer("quantize: source", lambda a, b, c: cli("quantize", a, b, "--overwrite")),
    Writer("quantize: source file", lambda a, b, c: cli("quantize", a, b, "--config", c),
           "transformer/model.safetensors"),
    Writer("quantize: config", lambda a, b, c: cli("quantize", c / NAMES["lora"], b, "--config", a),
           "config.json"),
    Writer("quantize: stats", lambda a, b, c: cli("quantize", c, b, "--stats", a, "--overwrite"),
           "stats.safetensors"),
    Writer("quantize: recipe", lambda a, b, c: cli("quantize", c, b, "--recipe", a, "--overwrite"),
           "recipe.toml"),
    Writer("quantize_checkpoint: source",
           lambda a, b, c: loraq.quantize_checkpoint(a, b, RECIPE, **IN_PLACE)),
    Writer("quantize_checkpoint: recipe",
           lambda a, b, c: loraq.quantize_checkpoint(c, b, a, **IN_PLACE), "recipe.toml"),
    Writer("quantize_checkpoint: stats", lambda a, b, c: loraq.quantize_checkpoint(
        c, b, RECIPE, stats=loraq.load_stats(a), **IN_PLACE), "stats.safetensors"),
    Writer("absorb-lora: model",
           lambda a, b, c: cli("absorb-lora", a, c, b, "--source", c, "--overwrite")),
    Writer("absorb-lora: lora",
           lambda a, b, c: cli("absorb-lora", c, a, b, "--source", c, "--overwrite"),
           NAMES["lora"]),
    Writer("absorb-lora: source",
           lambda a, b, c: cli("absorb-lora", c, c, b, "--source", a, "--overwrite")),
    Writer("absorb_lora: model", lambda a, b, c: absorbs(model=a, lora=c, source=c, target=b)),
    Writer("absorb_lora: lora", lambda a, b, c: absorbs(model=c, lora=a, source=c, target=b),
           NAMES["lora"]),
    Writer("absorb_lora: source", lambda a, b, c: absorbs(model=c, lora=c, source=a, target=b)),
    Writer("append-lora: model", lambda a, b, c: cli("append-lora", a, c, b, "--overwrite")),
    Writer("append-lora: second lora",
           lambda a, b, c: cli("append-lora", c, c, a, b, "--overwrite"), NAMES["lora"]),
    Writer("append_lora: model", lambda a, b, c: loraq.append_lora(a, c, target=b, **IN_PLACE)),
    Writer("append_lora: lora", lambda a, b, c: loraq.append_lora(c, a, target=b, **IN_PLACE),
           NAMES["lora"]),
    Writer("remove-lora: model", lambda a, b, c: cli("remove-lora", a, "x", b, "--overwrite")),
    Writer("remove_lora: model", lambda a, b, c: loraq.remove_lora(a, "x", target=b, **IN_PLACE)),
    Writer("export: source", lambda a, b, c: cli("export", a, b, "--to", "sdnq", "--overwrite")),
    Writer("export: lora",
           lambda a, b, c: cli("export", c, b, "--to", "sdnq", "--lora", a, "--overwrite"),
           NAMES["lora"]),
    Writer("export: source of a call",
           lambda a, b, c: loraq.export(a, b, to="sdnq", **IN_PLACE)),
    Writer("export: lora of a call",
           lambda a, b, c: loraq.export(c, b, to="sdnq", lora=[a], **IN_PLACE), NAMES["lora"]),
    Writer("report: folder", lambda a, b, c: cli("report", a, "--out", b)),
    Writer("import: source", lambda a, b, c: cli("import", a, b, "--overwrite")),
    Writer("import_checkpoint: source",
           lambda a, b, c: loraq.import_checkpoint(a, b, **IN_PLACE)),
    Writer("stats: pipeline", lambda a, b, c: cli("stats", a, b, "--overwrite")),
    Writer("stats: prompts", lambda a, b, c: cli("stats", c, b, "--prompts", a, "--overwrite"),
           "prompts.txt"),
    Writer("stats: recipe", lambda a, b, c: cli("stats", c, b, "--recipe", a, "--overwrite"),
           "recipe.toml"),
    Writer("evaluate: a", lambda a, b, c: evaluates(a, c, b, c / "prompts.txt")),
    Writer("evaluate: b", lambda a, b, c: evaluates(c, a, b, c / "prompts.txt")),
    Writer("evaluate: prompts", lambda a, b, c: evaluates(c, c, b, a), "prompts.txt"),
    Writer("collect_pipeline_stats: source",
           lambda a, b, c: loraq.collect_pipeline_stats(a, b, RECIPE, **IN_PLACE)),
    Writer("collect_stats: model",
           lambda a, b, c: loraq.collect_stats(Model(a), lambda: None, ["layer"], target=b)),
    Writer("save_stats: stats", lambda a, b, c: loraq.save_stats(loraq.load_stats(a), b),
           "stats.safetensors"),
    Writer("save: model", lambda a, b, c: loraq.save(quantized(a), b, overwrite=True),
           "transformer", OF_MEMORY),
    Writer("save: model of a pipeline", lambda a, b, c: loraq.save(quantized(a), b, overwrite=True),
           kinds=(SAME, PARENT, ALIAS, PARENT_ALIAS)),
    Writer("save_pretrained: model", lambda a, b, c: quantized(a).save_pretrained(b),
           "transformer", OF_MEMORY),
    Writer("demo: assets", lambda a, b, c: cli("demo", "--out", b), kinds=OF_PICTURE),
    Writer("draw: assets", lambda a, b, c: draw(result_of(a), b), kinds=(SAME, CHILD, ALIAS)),
    Writer("write_page: assets", lambda a, b, c: write_page(result_of(a), b),
           kinds=(SAME, CHILD, ALIAS)),
]  # fmt: skip

OVERLAPS = [
    pytest.param(writer, kind, id=f"{writer}, target is {kind}")
    for writer in WRITERS
    for kind in writer.kinds
]


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    fill(tmp_path / "models" / "read")
    fill(tmp_path / "apart")
    subject = digits.subject()._replace(folder=tmp_path / "models/read")
    monkeypatch.setattr(digits, "subject", lambda: subject)
    return tmp_path


def result_of(assets: Path) -> DemoResult:
    """Return what a demo found that read these files."""
    from tests.evaluation.test_demo import invented

    result = invented()
    return replace(result, subject=result.subject._replace(folder=assets))


def target_of(kind: str, read: Path, tree: Path) -> Path:
    if kind in (ALIAS, PARENT_ALIAS):
        (tree / "alias").symlink_to(read if kind == ALIAS else read.parent)
        return tree / "alias"
    if kind == LINKED:
        linked = read if read.is_file() else next(read.rglob("*.safetensors"))
        (tree / "originals").mkdir()
        linked.rename(tree / "originals" / linked.name)
        linked.symlink_to(tree / "originals" / linked.name)
        return tree / "originals"
    return {SAME: read, PARENT: read.parent, CHILD: read / "new.safetensors"}[kind]


@pytest.mark.parametrize(("writer", "kind"), OVERLAPS)
def test_what_is_read_is_never_written_to(tree, writer, kind):
    read = tree / "models" / "read" / writer.reads
    target = target_of(kind, read, tree)
    before = files_of(tree)
    refusals = r"Source and target|lies inside|is a link into|Will not replace"
    with pytest.raises(CheckpointError, match=refusals):
        writer.write(read, target, tree / "apart")
    assert files_of(tree) == before


def test_everything_that_writes_has_a_row():
    """A new command or call must be put into one of the two tables, and a writer gets rows."""
    found = {
        "commands": set(main.commands),
        "calls": {name for name in loraq.__all__ if isfunction(getattr(loraq, name))},
    }
    for kind, names in found.items():
        assert WRITING[kind] | READING[kind] == names
        rows = {writer.name.partition(":")[0] for writer in WRITERS}
        assert WRITING[kind] <= rows


def test_a_model_goes_back_to_where_it_came_from(tree):
    place = tree / "models" / "saved"
    model = quantized(place)
    loraq.save(model, place)
    loraq.save(model, place, overwrite=True)
    model.save_pretrained(place)
    loraq.load_into(Model(place), place)


def test_a_second_name_of_a_file_is_that_file(tree):
    """File systems that ignore case and mounts are seen through in the same way."""
    stats = tree / "apart" / "stats.safetensors"
    (tree / "second.safetensors").hardlink_to(stats)
    with pytest.raises(CheckpointError, match="Source and target are both"):
        loraq.save_stats(loraq.load_stats(stats), tree / "second.safetensors")


@pytest.mark.parametrize("name", [".out.partial", ".out.partial/files"])
def test_a_source_is_not_where_the_target_grows(tree, name):
    (tree / "apart").rename(tree / ".moved")
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / ".moved").rename(tree / name)
    with pytest.raises(CheckpointError, match=r"is where '.*out' would be prepared"):
        loraq.quantize_checkpoint(tree / name, tree / "out", RECIPE, **IN_PLACE)


@pytest.mark.parametrize(
    ("write", "begins"), [(draw, b"\x89PNG"), (write_page, b"<!doctype html>")]
)
def test_a_report_is_not_written_through_a_link_nor_into_a_second_name(tmp_path, write, begins):
    from tests.evaluation.test_demo import invented

    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "report").symlink_to("precious")
    with pytest.raises(LoraqError, match="it is a folder or a link"):
        write(invented(), tmp_path / "report")
    (tmp_path / "report").unlink()
    (tmp_path / "report").hardlink_to(tmp_path / "precious")
    with pytest.raises(LoraqError, match="loraq has not made it"):
        write(invented(), tmp_path / "report")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    (tmp_path / "report").unlink()
    for _ in range(2):  # its own is replaced
        write(invented(), tmp_path / "report")
    assert (tmp_path / "report").read_bytes().startswith(begins)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "report"]
