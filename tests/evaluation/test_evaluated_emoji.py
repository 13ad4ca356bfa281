"""`loraq evaluate` on trained weights: the emoji transformer, in the folder of a pipeline."""

import json
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")
world = pytest.importorskip("benchmarks.worlds.emoji")

import loraq  # noqa: E402
from loraq.cli import main  # noqa: E402
from loraq.evaluation import flow  # noqa: E402

if not (world.ASSETS / "captions.json").is_file():
    pytest.skip("only in a clone of the repository", allow_module_level=True)

STEPS = 4


class EmojiPipeline(diffusers.DiffusionPipeline):
    """Its only component is the transformer; captions are encoded by the table of words."""

    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(self, prompt, *, num_inference_steps=STEPS, generator=None):
        noise = torch.randn(1, 3, 64, 64, generator=generator)
        captions, empty = world.EMOJI.encode([prompt]), world.EMOJI.encode([""])
        drawn = flow.sample(
            self.transformer, noise, captions, empty, steps=num_inference_steps, guidance=2.0
        )
        pixels = drawn[0].add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
        return diffusers.ImagePipelineOutput(images=[Image.fromarray(pixels)])


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(diffusers, "EmojiPipeline", EmojiPipeline, raising=False)
    EmojiPipeline(world.EMOJI.load_transformer()).save_pretrained(tmp_path / "float")
    (tmp_path / "prompts.txt").write_text("red apple\ntiger face\npenguin\n")
    return tmp_path / "float"


@pytest.mark.slow
def test_fewer_bits_draw_other_pictures(source, tmp_path, capsys):
    def psnr(b: Path) -> float:
        words = ["evaluate", source, b, "--prompts", tmp_path / "prompts.txt", "--no-lpips"]
        words += ["--images", tmp_path / "images", "--dtype", "float32", "--json"]
        main([str(word) for word in words], standalone_mode=False)
        return json.loads(capsys.readouterr().out)["figures"]["PSNR"]["value"]

    found = {}
    for name in ("int8-a16", "int4-a16"):
        recipe = loraq.Recipe.from_dict({"scheme": name, "method": "rtn"})
        loraq.quantize_checkpoint(source / "transformer", tmp_path / name, recipe, progress=False)
        found[name] = psnr(tmp_path / name)
    assert 20 < found["int4-a16"] < found["int8-a16"] - 10
    assert found["int8-a16"] < 90
