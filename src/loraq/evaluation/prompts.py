"""What is drawn: prompts with names, the subset of them that published tables use, their seeds.

The protocol is that of SVDQuant's tables (deepcompressor): names in the order of the file, shuffled
with seed 0, the first N of them, sorted; the seed of an image is a hash of its name.
"""

import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError, MissingLibraryError, list_some
from loraq.regular_file import read_regular

#: The longest file of prompts that is read; MJHQ-30K's has 8 MB.
_MOST_BYTES = 256_000_000
#: Of the hash that gives seeds.
_BASE, _MODULUS = 31, 10**9 + 7


@dataclass(frozen=True)
class Prompt:
    """One image to draw."""

    #: Key in the file, such as that of an image of MJHQ-30K; of a text file the line's number.
    name: str
    text: str

    @property
    def seed(self) -> int:
        """The hash of the name that the published tables draw with."""
        value = 0
        for character in self.name:
            value = (_BASE * value + ord(character)) % _MODULUS
        return value

    @property
    def file_name(self) -> str:
        """Name of its PNG: that of the prompt as far as a file can have it, and a hash of both."""
        digest = hashlib.sha256(json.dumps([self.name, self.text]).encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9_-]', '_', self.name)[:80]}-{digest[:12]}.png"


def read_named_prompts(file: Path, count: int | None = None) -> tuple[Prompt, ...]:
    """Return the prompts of a file, or the published subset of that many.

    Args:
        file: MJHQ-30K's `meta_data.json`, sDCI's `sDCI.yaml`, or others of their form: a text, or
            an object with a `prompt`, by name. Any other file is text, one prompt a line.
        count: how many; `None` takes all, in the order of the file.

    Raises:
        LoraqError: it cannot be read, is none of these, or holds fewer prompts.
    """
    try:
        text = read_regular(file, _MOST_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise LoraqError(
            f"Cannot read the prompts '{file}': {error}. A text file, JSON or YAML is required."
        ) from error
    if file.suffix in _PARSERS:
        table = _named(_PARSERS[file.suffix](text, file), file)
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        table = {f"{i:05d}": line for i, line in enumerate(lines)}
    if len(table) < max(1, count or 1):
        raise LoraqError(
            f"'{file}' holds {len(table)} prompts, and {count or 1} are required. Ask for fewer, "
            "or give another file."
        )
    names = list(table)
    if count is not None:
        random.Random(0).shuffle(names)
        names = sorted(names[:count])
    return tuple(Prompt(name, table[name]) for name in names)


def _parse_json(text: str, file: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraqError(f"'{file}' is not JSON: {error}. Download it again.") from error


def _parse_yaml(text: str, file: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingLibraryError(
            f"'{file}' is YAML, and PyYAML cannot be imported ({error}). Install it with "
            '`pip install "loraq[evaluate]"`.'
        ) from error
    # The same subset as `safe_load`, by libyaml where it is there: seconds instead of a minute.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LoraqError(f"'{file}' is not YAML: {error}. Download it again.") from error
    finally:
        loader.dispose()


_PARSERS = {".json": _parse_json, ".yaml": _parse_yaml, ".yml": _parse_yaml}


def _named(content: Any, file: Path) -> dict[str, str]:
    """Return the prompts of a table by name, in its order."""
    if not isinstance(content, dict):
        raise LoraqError(
            f"'{file}' holds a {type(content).__name__}. Prompts by name are required, as in "
            "MJHQ-30K's 'meta_data.json' or sDCI's 'sDCI.yaml'."
        )
    found: dict[str, Any] = {
        str(name): entry.get("prompt") if isinstance(entry, dict) else entry
        for name, entry in content.items()
    }
    if wrong := [name for name, prompt in found.items() if not isinstance(prompt, str)]:
        raise LoraqError(
            f"'{file}' has no text for {list_some(wrong, 3)}. A text, or an object with a "
            "`prompt`, is required by each name."
        )
    return found
