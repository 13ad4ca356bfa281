"""JSON files: written the same way everywhere, and read with an error that names the file."""

import json
from pathlib import Path
from typing import Any

from loraq.disk import write_file
from loraq.errors import CheckpointError


def write_json(path: Path, content: Any) -> bytes:
    """Write JSON in the order of the content, and return what was written."""
    raw = encode_json(content)
    write_file(path, raw)
    return raw


def encode_json(content: Any) -> bytes:
    """Return JSON in the order of the content, with two spaces and a newline at the end."""
    return (json.dumps(content, indent=2) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path}' is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"Cannot read '{path}': {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"'{path}' holds a {type(content).__name__}. A JSON object is required."
        )
    return content
