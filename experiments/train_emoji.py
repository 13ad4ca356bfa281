"""Train the emoji world of `benchmarks/worlds/emoji.py`.

    PYTHONPATH=. python experiments/train_emoji.py --threads 2

Trains a `PixArtTransformer2DModel` (384 wide, 8 transformer blocks) as a rectified flow on 259
pictures of 64×64 pixels with captions, and writes `benchmarks/assets/emoji`.

Stop it whenever you like: started again, it goes on after the last checkpoint and ends at the same
bytes.
"""

from pathlib import Path

import train_patches
from benchmarks.worlds.emoji import ASSETS, EMOJI
from flow_training import Draw, train
from loraq.evaluation.emoji import SIZE

TRANSFORMER = train_patches.TRANSFORMER | {
    "patch_size": 8,
    "sample_size": SIZE,
    "caption_channels": 100,
}


def main() -> None:
    """Train, and write the assets."""
    draw = Draw(EMOJI.draw_pictures, EMOJI.class_tokens, len(EMOJI.captions))
    out = Path("studies/emoji")
    train(TRANSFORMER, draw, steps=4500, batch=32, out=out, assets=ASSETS)


if __name__ == "__main__":
    main()
