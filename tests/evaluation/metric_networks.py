"""Networks of metrics with random weights, in files of the forms that they are published in.

The true weights cannot be had in these tests: numbers say that the networks are run as they should
be, and nothing about images.
"""

import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraq.errors import LoraqError
from loraq.evaluation import weights
from loraq.evaluation.libraries import inception_class
from loraq.evaluation.lpips import alexnet_features


def store(monkeypatch: pytest.MonkeyPatch, source: str, state: dict, folder: Path) -> Path:
    """Write weights, and let the file be known by a name of its own."""
    name = f"random-{source.lower()}.safetensors"
    save_file({key: x.clone().contiguous() for key, x in state.items()}, folder / name)
    monkeypatch.setattr(weights, source, replace(getattr(weights, source), name=name))
    return folder / name


def random_alexnet(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    torch.manual_seed(0)
    state = {f"features.{name}": x for name, x in alexnet_features().state_dict().items()}
    return store(monkeypatch, "ALEXNET", {**state, "classifier.1.bias": torch.ones(2)}, folder)


def random_inception(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[torch.nn.Module, Path]:
    """Return torch-fidelity's own network, and the file of its weights; skip where it is not."""
    try:
        kind = inception_class()
    except LoraqError:
        pytest.skip("torch-fidelity is not installed: `make test-evaluate`")
    blank = type("Blank", (kind,), {"load_state_dict": lambda *_, **__: None})
    torch.manual_seed(0)
    torch.save({}, folder / "empty.pth")
    whole = blank("inception", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
    return whole, store(monkeypatch, "INCEPTION", whole.state_dict(), folder)


def random_dinov2(folder: Path) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=14
    )
    Dinov2Model(config).eval().save_pretrained(folder / "dinov2-large")
    return folder / "dinov2-large"


def random_clip(folder: Path) -> Path:
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPTokenizer,
    )

    torch.manual_seed(0)
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for character in string.ascii_lowercase + string.digits + string.punctuation:
        vocab[character] = len(vocab)
        vocab[f"{character}</w>"] = len(vocab)
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text = {"vocab_size": len(vocab), "max_position_embeddings": 20, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"image_size": 32, "patch_size": 8, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=width | text | ids, vision_config=width | vision, projection_dim=16
    )
    place = folder / "clip-vit-large-patch14"
    CLIPModel(config).eval().save_pretrained(place)
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(place)
    crop = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(place)
    return place
