"""The rules of the house that a machine can check: who imports
whom, how long a file is, what it is called.
"""

import ast
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

import loraq

SOURCE = Path(loraq.__file__).parent

#: Lowest first; a file imports from lower rows or from its own folder, never sideways and never up.
ROWS = (
    "disk errors figures regular_file version",
    "autocast dense devices formats json_files layer_input options stacks transforms",
    "expert_weight safetensors scheme linalg state stats",
    "budget packed precision recipe_names rules",
    "appended families kernels targets",
    "advice methods nn",
    "experts",
    "layers recipe parallel",
    "checkpoint doctor",
    "pipeline",
    "integrations",
    "pages transformers",
    "diffusers",
    "evaluation exports",
    "cli",
)
RANK = {part: row for row, parts in enumerate(ROWS) for part in parts.split()}

#: Where a library may be imported, by folder or file of the package; the empty list means nowhere.
FENCES = {
    "diffusers": ["integrations", "evaluation"],
    "transformers": ["integrations", "evaluation"],
    "accelerate": ["integrations", "evaluation"],
    "huggingface_hub": ["integrations"],
    "multiprocessing": ["pipeline/ranks.py"],
    "peft": ["integrations"],
    "matplotlib": ["evaluation"],
    "sklearn": ["evaluation"],
    "torchmetrics": ["evaluation"],
    "click": ["cli"],
    "rich": ["cli", "pipeline/progress.py"],
    "triton": [
        f"kernels/triton/{name}.py" for name in ("quant_down", "gemm_up", "small_m", "decode")
    ],
    "onnx_ir": ["exports/onnx_graph.py"],
    "onnxscript": ["exports/onnx_graph.py"],
    "gguf": [],
    "onnx": [],
    "onnxruntime": [],
    "openvino": ["kernels/openvino.py", "exports/openvino_graph.py"],
    "safetensors": [],
    "sdnq": [],
    "pickle": [],
    "torch_fidelity": ["evaluation"],
    "torchvision": ["evaluation/libraries.py"],
    "yaml": ["evaluation"],
}

FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
#: `__init__` and `__main__` of the package itself only point at the parts.
PARTS = [path for path in FILES if str(path) not in ("__init__.py", "__main__.py")]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((SOURCE / path).read_text(encoding="utf-8"))


def offenders(judge: Callable[[Path], object], paths: Iterable[Path] = FILES) -> dict[str, object]:
    """What a rule finds wrong, by file; every rule is one test whose failure lists all of it."""
    return {str(path): wrong for path in paths if (wrong := judge(path))}


def part_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything that is imported anywhere in a file; `from a import b` gives
    both a and a.b.
    """
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


def test_imports_go_down_only():
    assert not offenders(lambda path: upward_imports(path, tree_of(path)), PARTS)


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


def test_a_library_stays_inside_its_fence():
    def strays(path: Path) -> list[str]:
        found = {name.split(".")[0] for name in imported(tree_of(path))} & set(FENCES)
        return [name for name in found if not {str(path), part_of(path)} & set(FENCES[name])]

    assert not offenders(strays)


#: torch-fidelity loads pickles only: it gets one of ours, in memory.
SAVED_IN_MEMORY = "evaluation/features.py"


def unsafe_calls(path: Path, tree: ast.AST) -> set[str]:
    unsafe = {"torch.load", "torch.save", "eval", "exec"}
    unsafe |= {"yaml.load", "pickle.load", "pickle.loads"}
    unsafe -= {"torch.save"} if str(path) == SAVED_IN_MEMORY else set()
    return unsafe & set(calls(tree))


def test_nothing_unsafe_is_loaded():
    assert not offenders(lambda path: unsafe_calls(path, tree_of(path)))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("torch.load(path)", {"torch.load"}),
        ("torch.load(path, weights_only=True)", {"torch.load"}),
        ("torch.save(state, path)", {"torch.save"}),
    ],
)
def test_a_planted_call_is_judged(line, found):
    assert unsafe_calls(Path("nn.py"), ast.parse(line)) == found


def test_no_file_is_longer_than_400_lines():
    def excess(path: Path) -> int:
        return max(0, len((SOURCE / path).read_text(encoding="utf-8").splitlines()) - 400)

    assert not offenders(excess)


def test_a_file_says_what_it_is():
    def lacks_a_sentence(path: Path) -> bool:
        text = ast.get_docstring(tree_of(path))
        return not (text and text.splitlines()[0].endswith((".", ":")))

    assert not offenders(lacks_a_sentence)


def test_a_file_has_a_real_name():
    empty = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "wrapper"}
    assert not offenders(lambda path: empty & {part.removesuffix(".py") for part in path.parts})


def test_only_the_command_line_prints():
    assert not offenders(
        lambda path: part_of(path) != "cli" and "print" in set(calls(tree_of(path)))
    )


def test_nothing_is_imported_with_a_star():
    assert not offenders(
        lambda path: [name for name in imported(tree_of(path)) if name.endswith(".*")]
    )


def test_annotations_are_not_postponed():
    # The type check of the tests needs real objects in signatures.
    assert not offenders(lambda path: "__future__" in set(imported(tree_of(path))))


def test_the_parser_of_safetensors_files_knows_nothing_of_what_is_in_them():
    ours = {
        name
        for path in FILES
        if part_of(path) == "safetensors"
        for name in imported(tree_of(path))
        if name.startswith("loraq.")
    }
    assert {name.split(".")[1] for name in ours} == {
        "disk",
        "errors",
        "json_files",
        "regular_file",
        "safetensors",
    }


def test_a_rule_lists_its_offenders():
    assert set(offenders(lambda path: "loraq.py" in path.parts)) == {"methods/loraq.py"}
