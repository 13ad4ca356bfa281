"""The rules of the house that a machine can check: who imports whom, how long a file is, what it is called."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loraq

SOURCE = Path(loraq.__file__).parent

#: Lowest first; a file imports from lower rows or from its own folder, never sideways and never up.
ROWS = (
    "errors version",
    "formats json_files transforms",
    "safetensors scheme linalg stats",
    "budget packed recipe_names rules",
    "families kernels",
    "methods nn",
    "layers recipe parallel",
    "checkpoint doctor",
    "pipeline",
    "integrations",
    "diffusers evaluation",
    "cli",
)
RANK = {part: row for row, parts in enumerate(ROWS) for part in parts.split()}

#: Where a library may be imported, by folder or file of the package; the empty list means nowhere.
FENCES = {
    "diffusers": ["integrations", "evaluation"],
    "transformers": ["integrations", "evaluation"],
    "accelerate": ["integrations", "evaluation"],
    "huggingface_hub": ["integrations"],
    "multiprocessing": ["pipeline/workers.py"],
    "peft": ["integrations"],
    "matplotlib": ["evaluation"],
    "sklearn": ["evaluation"],
    "torchmetrics": ["evaluation"],
    "click": ["cli"],
    "rich": ["cli", "pipeline/progress.py"],
    "triton": [f"kernels/triton/{name}.py" for name in ("quant_down", "gemm_up", "small_m")],
    "safetensors": [],
    "pickle": [],
    "yaml": [],
}

FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
#: `__init__` and `__main__` of the package itself only point at the parts.
PARTS = [path for path in FILES if str(path) not in ("__init__.py", "__main__.py")]

each_file = pytest.mark.parametrize("path", FILES, ids=str)
each_part = pytest.mark.parametrize("path", PARTS, ids=str)


def tree_of(path: Path) -> ast.Module:
    return ast.parse((SOURCE / path).read_text(encoding="utf-8"))


def part_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything that is imported anywhere in a file; `from a import b` gives both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward_imports(path: Path, tree: ast.AST) -> list[str]:
    here = part_of(path)
    ours = {name for name in imported(tree) if name.startswith("loraq.")}
    there = {name.split(".")[1] for name in ours}
    return sorted(
        part for part in there if part != here and RANK.get(part, len(ROWS)) >= RANK[here]
    )


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_every_part_of_the_package_has_a_row():
    assert {part_of(path) for path in PARTS} <= set(RANK)


@each_part
def test_imports_go_down_only(path):
    assert not upward_imports(path, tree_of(path)), f"{part_of(path)} must not import these"


@pytest.mark.parametrize(
    ("path", "line", "found"),
    [
        ("nn.py", "from loraq.methods import RTN", ["methods"]),
        ("nn.py", "from loraq.pipeline.plan import Plan", ["pipeline"]),
        ("kernels/base.py", "import loraq.methods", ["methods"]),
        ("formats/block.py", "from loraq.formats.packing import pack", []),
        ("scheme.py", "if TYPE_CHECKING:\n    from loraq.nn import QuantizedLinear", ["nn"]),
        ("recipe.py", "def f():\n    from loraq import cli", ["cli"]),
        ("linalg.py", "from loraq import quantize_", ["quantize_"]),
        ("checkpoint/manifest.py", "from loraq import __version__", ["__version__"]),
    ],
)
def test_a_planted_import_is_judged(path, line, found):
    assert upward_imports(Path(path), ast.parse(line)) == found


@each_file
def test_a_library_stays_inside_its_fence(path):
    for library in {name.split(".")[0] for name in imported(tree_of(path))} & set(FENCES):
        homes = FENCES[library]
        assert str(path) in homes or part_of(path) in homes, f"{library} is not for {path}"


@each_file
def test_nothing_unsafe_is_loaded(path):
    unsafe = {
        "torch.load",
        "torch.save",
        "eval",
        "exec",
        "yaml.load",
        "pickle.load",
        "pickle.loads",
    }
    assert unsafe.isdisjoint(calls(tree_of(path)))


@each_file
def test_no_file_is_longer_than_400_lines(path):
    assert len((SOURCE / path).read_text(encoding="utf-8").splitlines()) <= 400


@each_file
def test_a_file_says_what_it_is(path):
    text = ast.get_docstring(tree_of(path))
    assert text is not None
    assert text.splitlines()[0].endswith((".", ":"))


@each_file
def test_a_file_has_a_real_name(path):
    assert {part.removesuffix(".py") for part in path.parts}.isdisjoint(
        {"utils", "util", "helpers", "helper", "common", "misc", "manager", "wrapper"}
    )


@each_file
def test_only_the_command_line_prints(path):
    if part_of(path) != "cli":
        assert "print" not in set(calls(tree_of(path)))


@each_file
def test_nothing_is_imported_with_a_star(path):
    assert not [name for name in imported(tree_of(path)) if name.endswith(".*")]


@each_file
def test_annotations_are_not_postponed(path):
    # The type check that tests can switch on needs real objects in signatures.
    assert "__future__" not in set(imported(tree_of(path)))


def test_the_parser_of_safetensors_files_knows_nothing_of_what_is_in_them():
    ours = {
        name
        for path in FILES
        if part_of(path) == "safetensors"
        for name in imported(tree_of(path))
        if name.startswith("loraq.")
    }
    assert {name.split(".")[1] for name in ours} == {"errors", "json_files", "safetensors"}
