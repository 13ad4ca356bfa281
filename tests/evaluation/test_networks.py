"""The networks of metrics are run as their libraries run them; and weights that are missing."""

import os
import re
import sys
from importlib.util import find_spec

import numpy
import pytest
import torch

from loraq.errors import LoraqError
from loraq.evaluation import features, weights
from loraq.evaluation.libraries import inception_class, torchmetrics
from loraq.evaluation.lpips import LPIPS, alexnet_features
from tests.evaluation.metric_networks import (
    random_alexnet,
    random_clip,
    random_dinov2,
    random_inception,
    store,
)

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")

CPU = torch.device("cpu")


@pytest.fixture
def pictures(tmp_path):
    rng = numpy.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=numpy.uint8)).save(path)
    return paths


# --- LPIPS ----------------------------------------------------------------------------------------


def test_lpips_is_that_of_torchmetrics(tmp_path, monkeypatch, rng):
    ours = LPIPS(random_alexnet(monkeypatch, tmp_path))
    theirs = torchmetrics().functional.image.lpips
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: alexnet_features())
    network = theirs._LPIPS(pretrained=True, net="alex", pnet_rand=True)
    trunk = [layer for i in range(1, 6) for layer in getattr(network.net, f"slice{i}")]
    for layer, own in zip(trunk, ours.features, strict=True):
        layer.load_state_dict(own.state_dict())
    a, b = torch.rand(2, 3, 3, 64, 80, generator=rng)
    expected = network(a, b, normalize=True).flatten()
    assert torch.allclose(ours(a, b), expected, rtol=1e-5, atol=0)
    assert expected.min() > 1e-4
    assert ours(a, a).eq(0).all()


def test_weights_of_another_network_are_refused(tmp_path, monkeypatch):
    path = store(monkeypatch, "ALEXNET", {"features.0.weight": torch.ones(3)}, tmp_path)
    with pytest.raises(LoraqError, match="are not AlexNet's"):
        LPIPS(path)


# --- Fréchet distances ----------------------------------------------------------------------------


def test_resizing_is_clean_fids(pictures):
    if find_spec("cleanfid") is None:
        pytest.skip("clean-fid is not installed: `make test-evaluate`")
    from cleanfid import resize as resizer

    for path in pictures:
        pixels = numpy.asarray(Image.open(path))
        expected = resizer.build_resizer("clean")(pixels).transpose(2, 0, 1)
        found = features.resize_cleanly(Image.open(path), features.INCEPTION_SIDE)
        assert numpy.array_equal(found.numpy(), expected)


def test_resizing_smooths_before_it_samples():
    stripes = numpy.tile(numpy.array([0, 255], dtype=numpy.uint8), 150)
    image = Image.fromarray(numpy.broadcast_to(stripes[None, :, None], (300, 300, 3)).copy())
    inner = features.resize_cleanly(image, 30)[:, 5:-5, 5:-5]
    assert (inner - 127.5).abs().max() < 2  # a filter that only samples would give 0 or 255


def test_inception_sees_what_torch_fidelitys_own_forward_sees(tmp_path, monkeypatch):
    whole, path = random_inception(monkeypatch, tmp_path)
    pixels = numpy.random.default_rng(0).integers(0, 256, (299, 299, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = features.inception_features([tmp_path / "a.png"], path, CPU)
    # At 299 pixels neither of the two resizes.
    (expected,) = whole(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert found.shape == (1, 2048)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert expected.std() > 0


def test_without_torch_fidelity_the_message_has_the_line_to_run(monkeypatch):
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LoraqError, match=r"`pip install --no-deps torch-fidelity`"):
        inception_class()


def test_dinov2_gives_its_class_token(tmp_path, pictures):
    from transformers import Dinov2Model

    place = random_dinov2(tmp_path)
    found = features.dinov2_features(pictures, place, CPU)
    pixels = features.resize_cleanly(Image.open(pictures[1]), 224) / 255
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        seen = Dinov2Model.from_pretrained(place)(((pixels - mean) / deviation)[None])
    assert found.shape == (3, 32)
    assert torch.allclose(found[1], seen.pooler_output[0], atol=1e-5)


def test_clip_score_is_a_hundred_times_the_cosine(tmp_path, pictures):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    place = random_clip(tmp_path)
    texts = ["a red fox", "fox", "far too long " * 20]
    found = features.clip_scores(pictures, texts, place, CPU)
    model = CLIPModel.from_pretrained(place)
    pixels = CLIPImageProcessorPil.from_pretrained(place)(
        [Image.open(path) for path in pictures], return_tensors="pt"
    )
    for i, text in enumerate(texts):
        tokens = AutoTokenizer.from_pretrained(place)(
            text, return_tensors="pt", truncation=True, max_length=20
        )
        with torch.no_grad():
            image = model.visual_projection(
                model.vision_model(pixels.pixel_values[i : i + 1]).pooler_output
            )
            read = model.text_projection(model.text_model(**tokens).pooler_output)
        expected = 100 * torch.cosine_similarity(image, read)
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-4)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ALEXNET", "INCEPTION", "DINOV2", "CLIP"])
def test_what_is_missing_is_named_in_one_line_with_its_source(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("loraq.evaluation.weights.cached_folder", lambda *_: None)
    source = getattr(weights, name)
    with pytest.raises(LoraqError) as caught:
        source.find(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message
    assert re.search(r"https://\S+$", message)
    for file in [source.name] if hasattr(source, "name") else source.files:
        assert file in message


def test_a_given_folder_comes_before_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    path = random_alexnet(monkeypatch, cache)
    assert weights.ALEXNET.find(None) == weights.ALEXNET.find(tmp_path) == path
    given = tmp_path / path.name
    given.write_bytes(path.read_bytes())
    assert weights.ALEXNET.find(tmp_path) == given
    given.write_bytes(b"damaged")
    with pytest.raises(LoraqError, match=str(given)):
        weights.read_weights(weights.ALEXNET.find(tmp_path))


def test_a_file_that_holds_code_is_not_run(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"features.0.weight": Bad()}, tmp_path / "bad.safetensors")
    with pytest.raises(LoraqError):
        weights.read_weights(tmp_path / "bad.safetensors")
    assert not (tmp_path / "made").exists()
