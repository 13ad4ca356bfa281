"""What the archives hold: all that the package needs, and no weights that only a clone needs."""

import re
import zipfile
from pathlib import Path

import pytest

hatchling = pytest.importorskip("hatchling.builders.sdist")
wheels = pytest.importorskip("hatchling.builders.wheel")

ROOT = Path(__file__).parents[1]
#: Most of the archive of the sources; no wheel has it.
DIGITS = "src/loraq/assets/digits/transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def files() -> dict[str, Path]:
    """Path in the archive to path here."""
    builder = hatchling.SdistBuilder(str(ROOT))
    return {file.distribution_path: Path(file.path) for file in builder.recurse_included_files()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    builder = wheels.WheelBuilder(str(ROOT))
    folder = tmp_path_factory.mktemp("wheel")
    return Path(next(builder.build(directory=str(folder), versions=["standard"])))


def test_the_archive_holds_the_package_and_its_benchmarks(files):
    assert {DIGITS, "pyproject.toml", "benchmarks/quality/run.py", "src/loraq/nn.py"} <= set(files)


def test_the_archive_leaves_the_weights_of_the_benchmarks_out(files):
    assert not [path for path in files if path.startswith("benchmarks/assets")]
    size = sum(path.stat().st_size for name, path in files.items() if name != DIGITS)
    assert size < 8e6


def test_the_wheel_is_small_and_lacks_the_digits_transformer_only(wheel, files):
    assert wheel.stat().st_size <= 3e6
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if name.startswith("loraq/")}
    package = {name.removeprefix("src/") for name in files if name.startswith("src/loraq/")}
    missing = {name for name in package - held if "assets/digits/transformer/" not in name}
    assert not missing
    assert not [name for name in held if "transformer/" in name]


def test_the_demo_of_a_wheel_says_where_its_model_is(wheel, tmp_path, monkeypatch):
    from loraq.errors import LoraqError
    from loraq.evaluation import digits

    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path)
    place = tmp_path / "loraq" / "assets" / "digits"
    assert place.is_dir()
    monkeypatch.setattr(digits, "assets_folder", lambda: place)
    with pytest.raises(LoraqError, match=r"clone of the repository.*make demo"):
        digits.subject()


def test_the_lowest_torch_that_is_allowed_is_tried_by_the_workflow():
    allowed = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    workflow = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    tried = re.search(r"torch: \[(.*)\]", workflow)
    assert allowed
    assert tried
    lowest = tried[1].split(",")[0].strip(' "')
    assert lowest.removesuffix(".0") == allowed[1]
