"""What stands in a folder, for tests that compare runs byte for byte."""

import hashlib
import json
from pathlib import Path


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by its path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def alone(transformer: Path) -> dict[str, bytes]:
    """Return the files of a transformer in a pipeline as they are of one that stands alone."""
    files = files_of(transformer)
    manifest = json.loads(files["loraq.json"])
    del manifest["components"]
    return files | {"loraq.json": (json.dumps(manifest, indent=2) + "\n").encode()}


def components_of(files: dict[str, bytes]) -> dict[str, dict[str, object]]:
    """Return what the manifest says of a pipeline's other files."""
    return {
        name: {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        for name in sorted(files)
    }
