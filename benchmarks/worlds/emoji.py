"""The emoji world: the model that `make demo` shows, and the pictures that it is trained on."""

from pathlib import Path

from loraq.evaluation.emoji import Emoji

ASSETS = Path(__file__).parents[1] / "assets" / "emoji"
EMOJI = Emoji(ASSETS)
