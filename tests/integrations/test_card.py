"""The model card goes to the hub the libraries' own way, and what its owner wrote stays."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small.pixart import small_pixart, velocity

import loraq
from loraq.checkpoint.inspect import count_stored
from loraq.checkpoint.manifest import Manifest
from loraq.integrations.card import BEGIN, END, FILE_NAME
from loraq.recipe import Recipe
from tests.folders import files_of

diffusers = pytest.importorskip("diffusers")
import huggingface_hub  # noqa: E402
from huggingface_hub.errors import EntryNotFoundError  # noqa: E402

import loraq.diffusers  # noqa: E402

PixArt = diffusers.PixArtTransformer2DModel
RECIPE = replace(Recipe.named("mxfp4-a16+w8a8-r4"), method="svdquant")
OWN = "---\nlicense: mit\nlibrary_name: diffusers\n---\n# Mine\n\nWritten by hand.\n"


class Hub:
    """A hub of one repository: the four calls that the libraries make when they push."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import diffusers.utils.hub_utils as hub_of_diffusers

        self.place = place
        self.asked: dict[str, Any] = {}
        named = lambda *_, repo_id="me/x", **__: type("Repo", (), {"repo_id": repo_id})  # noqa: E731
        monkeypatch.setattr(hub_of_diffusers, "create_repo", lambda repo_id, **_: named())
        monkeypatch.setattr(hub_of_diffusers, "upload_folder", self.upload_folder)
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", named)
        monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", self.create_commit)
        monkeypatch.setattr(huggingface_hub.repocard, "hf_hub_download", self.download)

    def upload_folder(self, *, folder_path, path_in_repo=None, **asked):
        self._take({name: Path(folder_path, name) for name in files_of(Path(folder_path))})
        self.asked = asked | {"path_in_repo": path_in_repo}

    def create_commit(self, *, operations, **asked):
        self._take({each.path_in_repo: Path(each.path_or_fileobj) for each in operations})
        self.asked = asked

    def download(self, _, name, **__):
        if not (self.place / name).is_file():
            raise EntryNotFoundError(name)
        return str(self.place / name)

    def _take(self, files: dict[str, Path]) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        for name, path in files.items():
            (self.place / name).write_bytes(path.read_bytes())

    @property
    def card(self) -> str:
        return (self.place / FILE_NAME).read_text()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    return Hub(tmp_path / "me" / "x", monkeypatch)


@pytest.fixture(scope="module")
def quantized():
    model = small_pixart(torch.float32, num_layers=1)
    loraq.quantize_(model, RECIPE, progress=False)
    return model


@pytest.fixture(scope="module")
def folder(quantized, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("card") / "q"
    quantized.save_pretrained(place)
    return place


def test_a_new_repository_gets_a_card_with_what_was_measured(quantized, hub):
    quantized.push_to_hub("me/x", create_pr=True, commit_message="4 bits", token="t")
    asked = {"create_pr": True, "commit_message": "4 bits", "token": "t", "repo_id": "me/x"}
    assert asked.items() <= hub.asked.items()
    manifest = Manifest.read(hub.place)
    made = [layer for layer in manifest.layers.values() if not layer.is_kept]
    errors = [layer.record["relative_error"] for layer in made]
    assert f"mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f}" in hub.card
    parameters, nbytes = count_stored(hub.place, manifest)
    assert f"{8 * nbytes / parameters:.2f} bits for each of {parameters:,} parameters" in hub.card
    assert "| made with | method svdquant, effort default, seed 0 |" in hub.card
    assert f"| {len(made)} layers | mxfp4 + rank 4 in mxint8 |" in hub.card
    assert f"| {len(manifest.layers) - len(made)} layers | kept in 8 bits" in hub.card
    data = huggingface_hub.ModelCard(hub.card).data.to_dict()
    assert data["tags"] == ["loraq", "quantized"]
    assert data["library_name"] == "diffusers"
    assert "automatically generated" not in hub.card


def test_the_lines_of_the_card_load_the_model(quantized, hub, tmp_path, monkeypatch):
    quantized.push_to_hub("me/x")
    (code,) = re.findall(r"```python\n(.*?)```", hub.card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["model"].dtype == torch.bfloat16
    assert torch.equal(velocity(PixArt.from_pretrained(tmp_path / "me" / "x")), velocity(quantized))


@pytest.mark.parametrize("load", [PixArt.from_pretrained, loraq.load])
def test_a_loaded_model_is_described_too(folder, hub, load):
    load(folder).push_to_hub("me/x")
    assert BEGIN in hub.card


@pytest.mark.parametrize("text", [OWN, OWN.replace("by hand", "after “This model card”")])
def test_a_card_of_the_owner_stays(quantized, hub, text):
    hub.place.mkdir(parents=True)
    (hub.place / FILE_NAME).write_text(text)
    quantized.push_to_hub("me/x")
    assert hub.card == text


def test_a_template_in_which_somebody_has_written_stays(quantized, hub):
    library = PixArt(**small_pixart(torch.float32, num_layers=1).config)
    library.push_to_hub("me/x")  # a float model: the library's own template
    edited = hub.card.replace("[More Information Needed]", "Somebody", 1)
    assert edited != hub.card
    (hub.place / FILE_NAME).write_text(edited)
    quantized.push_to_hub("me/x")
    assert hub.card == edited


def test_only_what_stands_between_the_marks_is_written_anew(quantized, hub):
    quantized.push_to_hub("me/x")
    first = hub.card
    begin, end = first.index(BEGIN), first.index(END)
    (hub.place / FILE_NAME).write_text(
        f"{first[:begin]}Before.\r\n{BEGIN}\nstale\n{first[end:]}\nAfter: {BEGIN[:9]}\n"
    )
    quantized.push_to_hub("me/x")
    with (hub.place / FILE_NAME).open(newline="") as file:
        again = file.read()
    assert again == f"{first[:begin]}Before.\r\n{first[begin:]}\nAfter: {BEGIN[:9]}\n"


def test_saving_with_push_to_hub_describes_it_there_and_not_here(quantized, hub, tmp_path):
    quantized.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/x")
    assert BEGIN in hub.card
    assert not (tmp_path / "out" / FILE_NAME).exists()


def test_a_model_in_a_subfolder_has_no_card(quantized, hub):
    quantized.push_to_hub("me/x", subfolder="transformer")
    assert hub.asked["path_in_repo"] == "transformer"
    assert not (hub.place / FILE_NAME).exists()


def test_a_model_that_is_float_again_is_pushed_as_the_library_does(folder, hub):
    PixArt.from_pretrained(folder).dequantize().push_to_hub("me/x")
    assert "automatically generated" in hub.card


def test_a_text_encoder_is_described_for_its_library(hub, tmp_path):
    transformers = pytest.importorskip("transformers")
    from small.encoders import T5

    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**T5))
    loraq.quantize_(model, RECIPE, progress=False)
    model.push_to_hub("me/x", commit_message="4 bits", tags=["text"])
    assert hub.asked["commit_message"] == "4 bits"
    assert 'T5EncoderModel.from_pretrained("me/x", dtype=torch.bfloat16)' in hub.card
    assert "import loraq.transformers" in hub.card
    assert huggingface_hub.ModelCard(hub.card).data.tags == ["text", "loraq", "quantized"]
    loaded = transformers.T5EncoderModel.from_pretrained(tmp_path / "me" / "x")
    assert loaded.is_quantized
