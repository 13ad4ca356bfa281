"""The emoji world: pictures with captions in words, and a training that draws from them."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("PIL")
world = pytest.importorskip("benchmarks.worlds.emoji")
flow_training = pytest.importorskip("flow_training")
train_emoji = pytest.importorskip("train_emoji")

from loraq.errors import LoraqError  # noqa: E402
from loraq.evaluation.emoji import N_TOKENS, SHOWN, SIZE, Emoji  # noqa: E402

emoji = world.EMOJI
if not (world.ASSETS / "captions.json").is_file():
    pytest.skip("only in a clone of the repository", allow_module_level=True)

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "cross_attention_dim": 16,
}


def test_every_picture_has_a_caption_of_its_own_and_is_on_white():
    captions, pictures = emoji.captions, emoji.pictures
    assert len(set(captions)) == len(captions) == len(pictures) > 250
    assert pictures.shape[1:] == (3, SIZE, SIZE)
    assert pictures.min() >= -1
    assert (pictures[..., 0, 0] > 0.9).float().mean() > 0.9  # corners
    # A red apple is redder than a green one: pictures and captions have one order.
    red, green = (pictures[captions.index(f"{color} apple")] for color in ("red", "green"))
    assert (red[0] - red[1]).mean() > (green[0] - green[1]).mean() + 0.3


def test_a_caption_is_the_vectors_of_its_words():
    tokens = emoji.encode(["red apple", "apple", ""])
    assert tokens.shape == (3, N_TOKENS, 100)
    assert torch.equal(tokens[0, 1], tokens[1, 0])
    assert tokens[1, 1:].any() == tokens[2].any() == torch.tensor(False)
    assert tokens[0, 0].square().mean() == pytest.approx(1, abs=1e-4)
    everything = emoji.class_tokens(torch.arange(len(emoji.captions) + 1))
    assert torch.equal(everything[emoji.captions.index("red apple")], tokens[0])
    assert not everything[-1].any()


@pytest.mark.parametrize("caption", ["red spaceship", "red red red red red red"])
def test_a_caption_that_cannot_be_encoded_is_refused(caption):
    with pytest.raises(LoraqError, match="cannot be encoded"):
        emoji.encode([caption])


def test_the_model_draws_what_it_is_asked_for():
    """Of all pictures a sample is nearest to the one whose caption it was drawn from."""
    model, labels = emoji.load_transformer(torch.float32), emoji.first_labels(len(SHOWN))
    assert [emoji.captions[label] for label in labels] == list(SHOWN)
    drawn = emoji.sample(model, labels, seed=0, steps=10)
    distances = torch.cdist(drawn.flatten(1), emoji.pictures.flatten(1))
    assert (distances.argmin(1) == labels).float().mean() >= 0.8


def test_damaged_weights_are_refused_by_their_name(tmp_path):
    for name in ("config.json", "transformer.safetensors.xz"):
        (tmp_path / name).write_bytes((world.ASSETS / name).read_bytes()[:2000])
    with pytest.raises(LoraqError, match=r"transformer\.safetensors\.xz' is damaged"):
        Emoji(tmp_path).load_transformer()


def test_the_probe_sees_other_pictures_with_another_seed():
    model = emoji.load_transformer(torch.float32)
    first, again = (emoji.velocity_probe(model, count=3, seed=1) for _ in range(2))
    assert first.shape == (3, 3, SIZE, SIZE)
    assert torch.equal(first, again)
    assert not torch.equal(first, emoji.velocity_probe(model, count=3, seed=2))


def test_a_small_transformer_learns_and_draws_the_pictures(tmp_path):
    draw = flow_training.Draw(emoji.draw_pictures, emoji.class_tokens, len(emoji.captions))
    settings = {"seed": 0, "steps": 3, "batch": 2, "learning_rate": 1e-3}
    training = flow_training.Training(train_emoji.TRANSFORMER | SMALL, settings, draw)
    training.run(3, tmp_path / "checkpoint.safetensors")
    drawn = emoji.sample(training.average, torch.tensor([0, 7]), seed=1, steps=2)
    assert drawn.shape == (2, 3, SIZE, SIZE)
    assert torch.equal(drawn, emoji.sample(training.average, torch.tensor([0, 7]), seed=1, steps=2))
