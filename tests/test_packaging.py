"""What an archive of the sources holds: all that the package needs, and no weights of test-beds."""

from pathlib import Path

import pytest

hatchling = pytest.importorskip("hatchling.builders.sdist")

ROOT = Path(__file__).parents[1]
#: Ships in every wheel and is most of the archive.
DIGITS = "src/loraq/assets/digits/transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def files() -> dict[str, Path]:
    """Path in the archive to path here."""
    builder = hatchling.SdistBuilder(str(ROOT))
    return {file.distribution_path: Path(file.path) for file in builder.recurse_included_files()}


def test_the_archive_holds_the_package_and_its_benchmarks(files):
    assert {DIGITS, "pyproject.toml", "benchmarks/quality/run.py", "src/loraq/nn.py"} <= set(files)


def test_the_archive_leaves_the_weights_of_the_benchmarks_out(files):
    assert not [path for path in files if path.startswith("benchmarks/assets")]
    size = sum(path.stat().st_size for name, path in files.items() if name != DIGITS)
    assert size < 8e6
