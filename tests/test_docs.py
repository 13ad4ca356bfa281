"""What the documents say is true: their code runs, and what they name is there."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import click
import pytest

from docs import generate
from loraq.cli import main

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "loraq"

if not (ROOT / "README.md").is_file():
    pytest.skip("the documents are only in a clone of the repository", allow_module_level=True)

REQUIRED = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "docs/architecture.md",
    "docs/log.md",
    "docs/decisions",
]
PAGES = sorted(
    page.relative_to(ROOT)
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *SOURCE.rglob("*.md")]
    if not page.name.startswith(".")
)
#: First parts of paths that can be checked; `demo/report.png` and the like are only made when
#: somebody runs something.
TOP = ("src", "tests", "docs", "benchmarks", "examples", "experiments")


_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")


def on_every_page(judge: Callable[[Path], object]) -> Callable[[], None]:
    """Make one test of a function that returns what is wrong
    with a page; it lists all offenders.
    """

    @wraps(judge)
    def test() -> None:
        assert not {str(page): wrong for page in PAGES if (wrong := judge(page))}

    del test.__wrapped__  # pytest would look there for arguments
    return test


def text_of(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language; "" is for those without one."""
    return [body for found, body in _FENCE.findall(text) if found == language]


def inline_code(text: str) -> list[str]:
    return _CODE.findall(_FENCE.sub("", text))


def commands(text: str) -> list[list[str]]:
    """The words after `loraq` wherever a command is shown, in a
    block of its own or inside a sentence.
    """
    lines = [line for _, body in _FENCE.findall(text) for line in body.splitlines()]
    lines = [
        line.split(" #")[0].strip().removeprefix("$ ").removeprefix(".venv/bin/") for line in lines
    ]
    lines = [line.removeprefix("Example: ") for line in lines]
    shown = [line for line in [*lines, *inline_code(text)] if re.match(r"loraq( |$)", line)]
    return [re.split(r"\s{2,}|…", line)[0].split()[1:] for line in shown]


def wrong_words(words: list[str]) -> list[str]:
    """Return the command or the options that do not exist."""
    if not words or words[0].startswith("-"):
        return [word for word in words if word not in ("--help", "-h", "--version")]
    if words[0] not in main.commands:
        return words[:1]
    legal = {"--help", "-h"}.union(*(option.opts for option in main.commands[words[0]].params))
    return [word for word in words[1:] if word.startswith("-") and word.split("=")[0] not in legal]


# --- what must be there ---------------------------------------------------------------------------


def test_a_house_has_these():
    assert not [path for path in REQUIRED if not (ROOT / path).exists()]


def test_there_are_decisions():
    pages = (ROOT / "docs" / "decisions").glob("*.md")
    names = [page.name for page in pages if page.name != "index.md"]  # generated
    assert names
    assert all(re.match(r"\d{4}-[a-z0-9-]+\.md$", name) for name in names)
    titles = {name: text_of(Path("docs", "decisions", name)) for name in names}
    assert not [name for name, text in titles.items() if not text.startswith(f"# {name[:4]} ")]


def test_the_changelog_has_this_version():
    import loraq

    assert re.search(
        rf"\b{re.escape(loraq.__version__)}\b|[Uu]nreleased", text_of(Path("CHANGELOG.md"))
    )


# --- code -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(text_of(page), "python")], ids=str
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    program = "import torch\ntorch.set_num_threads(1)\n" + "\n".join(
        blocks(text_of(page), "python")
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_the_readme_has_code():
    assert blocks(text_of(Path("README.md")), "python")


# --- commands and paths ---------------------------------------------------------------------------


@on_every_page
def test_every_command_of_a_page_exists(page):
    return {
        " ".join(words): wrong for words in commands(text_of(page)) if (wrong := wrong_words(words))
    }


def test_every_command_that_a_message_of_the_library_names_exists():
    wrong = {}
    for path in SOURCE.rglob("*.py"):
        for line in re.findall(r"`loraq ([^`\n]+)`", path.read_text(encoding="utf-8")):
            if words := wrong_words(line.split()):
                wrong[f"{path.relative_to(SOURCE)}: {line}"] = words
    assert not wrong


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("quantize A B --workers 2", []),
        ("quantize A B --resume", ["--resume"]),
        ("judge A", ["judge"]),
        ("plan A --budget=5.0 --json", []),
        ("--version", []),
        ("--nonsense", ["--nonsense"]),
    ],
)
def test_a_planted_command_is_judged(line, wrong):
    assert wrong_words(shlex.split(line)) == wrong
    assert wrong_words(commands(f"Text `loraq {line}` text.")[0]) == wrong
    assert wrong_words(commands(f"```\nloraq {line}     # why\n```\n")[0]) == wrong


@on_every_page
def test_every_link_of_a_page_leads_somewhere(page):
    links = [link.split("#")[0] for link in _LINK.findall(text_of(page)) if "://" not in link]
    return [link for link in links if link and not (ROOT / page.parent / link).exists()]


@on_every_page
def test_every_path_of_a_page_exists(page):
    paths = [
        code.split(":")[0] for code in inline_code(text_of(page)) if re.fullmatch(r"[\w./-]+", code)
    ]
    paths = [path for path in paths if path.split("/")[0] in TOP and "/" in path]
    return [path for path in paths if not (ROOT / path).exists()]


@on_every_page
def test_every_script_of_a_page_exists(page):
    code = [body for _, body in _FENCE.findall(text_of(page))] + inline_code(text_of(page))
    scripts = [
        script for body in code for script in re.findall(r"python3? ((?:\w+/)+\w+\.py)", body)
    ]
    return [script for script in scripts if not (ROOT / script).is_file()]


@on_every_page
def test_every_module_of_a_page_exists(page):
    code = [body for _, body in _FENCE.findall(text_of(page))] + inline_code(text_of(page))
    modules = {name for body in code for name in re.findall(r"python3? -m ([\w.]+)", body)}
    paths = [name.replace(".", "/") for name in modules if name.split(".")[0] in TOP]
    return [path for path in paths if not (ROOT / f"{path}.py").is_file()]


@on_every_page
def test_every_make_target_of_a_page_exists(page):
    code = [body for _, body in _FENCE.findall(text_of(page))] + inline_code(text_of(page))
    targets = {
        target
        for body in code
        for target in re.findall(r"^make ([a-z][a-z-]*)", body, re.MULTILINE)
    }
    rules = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return targets - rules


@on_every_page
def test_every_public_name_of_a_page_exists(page):
    import loraq

    names = {
        name for code in inline_code(text_of(page)) for name in re.findall(r"\bloraq\.(\w+)", code)
    }
    files = {"json"}  # loraq.json, the manifest
    parts = {path.stem for path in SOURCE.iterdir()}
    return [name for name in names - files - parts if not hasattr(loraq, name)]


# --- the tree -------------------------------------------------------------------------------------


def paths_of(tree: str) -> set[str]:
    """Paths of a tree that is drawn with lines."""
    open_folders: list[str] = []
    found = set()
    for line in tree.splitlines():
        if match := re.match(r"([│ ]*)[├└]── (\S+)", line):
            depth = len(match[1]) // 4
            open_folders[depth:] = [match[2].rstrip("/")]
            found.add("/".join(open_folders))
    return found


def test_every_source_file_is_in_the_tree_of_the_architecture():
    drawn = set().union(
        *(paths_of(body) for body in blocks(text_of(Path("docs/architecture.md")), ""))
    )
    there = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")}
    assert not there - drawn
    assert not [
        path for path in drawn if not (SOURCE / path).exists() and not (ROOT / path).exists()
    ]


def test_a_generated_page_can_be_made_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "HERE", tmp_path)
    assert generate.run(["formats.md"], check=True).startswith("Stale: formats.md. Run ")
    assert generate.run(["formats.md"], check=False) is None
    assert generate.run(["formats.md"], check=True) is None
    assert [path.name for path in tmp_path.iterdir()] == ["formats.md"]
    assert "No such page: cli. Known: formats.md, cli.md" in generate.run(["cli"], check=True)


@pytest.mark.parametrize(
    ("page", "bars", "most"),
    [("performance.md", "## The bars", 160), ("quality.md", "## The bar", 180)],
)
def test_what_is_visible_of_a_page_of_results_is_short(page, bars, most):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    folded = re.findall(r"^<details.*?^</details>$", text, re.MULTILINE | re.DOTALL)
    assert text.count("<details") == len(folded)
    visible = len(text.splitlines()) - sum(len(part.splitlines()) for part in folded)
    assert visible <= most
    assert len(text.split("## In short\n\n")[1].split("\n\n")[0].splitlines()) <= 12
    assert text.index("## In short") < text.index(bars) < text.index("<details")
    assert not [part for part in folded if "## " in part]


@pytest.mark.slow
def test_the_generated_pages_are_fresh():
    # That one plans full-size models for half a minute; `make site` looks at it.
    names = [name for name in generate.PAGES if name != "architectures.md"]
    # In a process of its own: click remembers how help was asked for before.
    command = [sys.executable, "-m", "docs.generate", "--check", *names]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_command_line_page_names_every_command_and_option():
    text = text_of(Path("docs/cli.md"))
    for name, command in main.commands.items():
        assert f"## loraq {name}" in text
        options = [option for option in command.params if isinstance(option, click.Option)]
        assert all(option.opts[0] in text for option in options)


@on_every_page
def test_a_page_names_no_place_of_somebody_s_machine(page):
    return re.findall(r"(?:/home/|/root/|/Users/|C:\\)\S*", text_of(page))


def test_the_lab_book_has_a_verdict_for_every_question():
    text = text_of(Path("docs/log.md"))
    entries = re.findall(r"^## (\S+) — (.*)$", text, re.MULTILINE)
    assert re.findall(r"^\| (\d\S+) \| (.*) \| .+ \|$", text, re.MULTILINE) == entries


@on_every_page
def test_what_a_page_folds_is_markdown_on_the_site_too(page):
    assert "md_in_html" in text_of(Path("mkdocs.yml"))
    text = text_of(page)
    opened = re.findall(r"^<details.*>$", text, re.MULTILINE)
    plain = [line for line in opened if line != '<details markdown="1">']
    return plain or len(opened) != len(re.findall(r"^</details>$", text, re.MULTILINE))


def test_every_page_can_be_reached_on_the_site():
    listed = set(re.findall(r"^ +- .*: (\S+\.md)$", text_of(Path("mkdocs.yml")), re.MULTILINE))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert listed == pages | {"decisions/index.md"}
    notes = {page.name for page in (ROOT / "docs" / "decisions").glob("[0-9]*.md")}
    assert set(re.findall(r"\]\((.+?)\)", text_of(Path("docs/decisions/index.md")))) == notes
