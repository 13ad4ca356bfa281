"""The patches world: photographs of packages, weights of the repository, training that resumes."""

from functools import partial

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("diffusers")
patches = pytest.importorskip("benchmarks.worlds.patches")
train_patches = pytest.importorskip("train_patches")
flow_training = pytest.importorskip("flow_training")

SETTINGS = {"seed": 0, "steps": 4, "batch": 2, "learning_rate": 1e-3}
SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "cross_attention_dim": 16,
}


def test_what_is_held_out_is_no_part_of_what_is_learned():
    learned, heldout = (patches.photographs(heldout=flag) for flag in (False, True))
    assert len(learned) == len(heldout) == patches.NULL_LABEL
    for left, right in zip(learned, heldout, strict=True):
        assert left.shape[1] == right.shape[1]
        assert left.shape[2] == (left.shape[2] + right.shape[2]) * 4 // 5
        assert min(*left.shape[1:], *right.shape[1:]) >= 2 * patches.SIZE
        assert -1 <= left.min() < left.max() <= 1


def test_patches_follow_from_the_seed():
    parts = patches.photographs(heldout=True)
    one, other, third = (
        patches.cut_patches(parts, 3, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert one[0].shape == (3, 3, patches.SIZE, patches.SIZE)
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[0], third[0])


def training(**settings: float) -> "flow_training.Training":
    parts = patches.photographs(heldout=False)
    draw = flow_training.Draw(
        partial(patches.cut_patches, parts), patches.class_tokens, patches.NULL_LABEL
    )
    return flow_training.Training(train_patches.TRANSFORMER | SMALL, SETTINGS | settings, draw)


def test_a_training_that_was_stopped_ends_at_the_same_weights(tmp_path):
    whole = training()
    whole.run(4, tmp_path / "whole.safetensors")
    training().run(2, tmp_path / "part.safetensors")
    resumed = training()
    resumed.resume(tmp_path / "part.safetensors")
    assert resumed.done == 2
    resumed.run(4, tmp_path / "part.safetensors")
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name
    with pytest.raises(SystemExit, match="Give the same settings"):
        training(seed=1).resume(tmp_path / "part.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(
    not (patches.ASSETS / "config.json").is_file(), reason="only in a clone of the repository"
)
def test_the_trained_weights_predict_velocities_of_patches_they_never_saw():
    model = patches.load_transformer(torch.float32)
    velocity = patches.velocity_probe(model, count=32)
    assert velocity.shape == (32, 3, patches.SIZE, patches.SIZE)
    assert torch.equal(velocity, patches.velocity_probe(model, count=32))
    # The probe's own choice of patches, times and noise.
    generator = torch.Generator().manual_seed(0)
    images, _ = patches.cut_patches(patches.photographs(heldout=True), 32, generator)
    torch.rand(32, generator=generator)
    target = torch.randn(images.shape, generator=generator) - images
    assert (velocity - target).square().mean() < 0.25 * target.square().mean()
