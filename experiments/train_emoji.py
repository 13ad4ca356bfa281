"""Train the emoji world of `benchmarks/worlds/emoji.py`.

    PYTHONPATH=. python experiments/train_emoji.py --threads 2

Trains a `PixArtTransformer2DModel` (384 wide, 8 transformer blocks) as a rectified flow on 259
pictures of 64×64 pixels with captions, and writes `benchmarks/assets/emoji`.

Stop it whenever you like: started again, it goes on after the last checkpoint and ends at the same
bytes.
"""

from pathlib import Path

from benchmarks.worlds import emoji
from flow_training import Draw, train

TRANSFORMER = {
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "num_layers": 8,
    "patch_size": 8,
    "sample_size": emoji.SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "cross_attention_dim": 384,
    "caption_channels": 100,
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
    "use_additional_conditions": False,
    "interpolation_scale": 1,
}


def main() -> None:
    """Train, and write the assets."""
    draw = Draw(emoji.draw_pictures, emoji.class_tokens, len(emoji.captions()))
    out = Path("studies/emoji")
    train(TRANSFORMER, draw, steps=4500, batch=64, out=out, assets=emoji.ASSETS)


if __name__ == "__main__":
    main()
