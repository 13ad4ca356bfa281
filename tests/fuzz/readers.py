"""The readers: what is read, from which valid files, and when accepting a mutated one is right.

A reader makes its valid files once. For each input it gets a copy of them to mutate and to read;
`read` returns if what it has read is right, and raises what the reader under test raises. To add
one, write a subclass and put it into `READERS`.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loraq
from loraq.checkpoint.folder import file_sha256
from loraq.checkpoint.inspect import compare, measure_memory, read_checked
from loraq.checkpoint.manifest import FILE_NAME, Manifest
from loraq.checkpoint.partial import PartialFolder, resumable_folder
from loraq.checkpoint.stats_file import load_stats, save_stats
from loraq.errors import LoraqError
from loraq.integrations import checkpoints, drawing
from loraq.integrations.diffusers import empty_model
from loraq.integrations.lora import Lora
from loraq.layers import quantized_layers
from loraq.recipe import Recipe
from loraq.rules import Rule
from loraq.safetensors.header import DTYPES
from loraq.safetensors.layout import write_shards
from loraq.safetensors.reader import ShardReader
from loraq.stats import ActivationStats
from tests.fuzz import mutations as m

CONFIG = "config.json"
FLOAT_WEIGHTS = "diffusion_pytorch_model.safetensors"


class Reader:
    """One reader under test."""

    #: How many of all inputs it gets, relative to others: the slow ones get few.
    share = 4

    def make(self, folder: Path) -> None:
        """Write the valid files."""
        raise NotImplementedError

    def mutate(self, random: Random, folder: Path) -> None:
        """Change one or two files of a copy; by default any, as their names say."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in random.sample(files, random.choice((1, 1, 1, min(2, len(files))))):
            if random.random() < 0.04:
                m.replace_file(random, path)
            elif path.suffix == ".json":
                m.mutate_json_file(random, path)
            elif path.suffix == ".safetensors":
                m.mutate_safetensors(random, path)
            else:
                path.write_bytes(m.mutate_bytes(random, path.read_bytes()))

    def read(self, folder: Path) -> None:
        """Read a mutated copy; returns if that is right."""
        raise NotImplementedError


def net() -> nn.Module:
    """Return a small model: three layers of which two are quantized, a norm, a buffer."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(32, 64), "norm": nn.LayerNorm(64), "b": nn.Linear(64, 32, bias=False)}
    model = nn.ModuleDict({**layers, "head": nn.Linear(32, 4)})
    model.register_buffer("steps", torch.tensor([3]))
    return model


def quantized_net(name: str = "mxfp4+w8a8-r4") -> nn.Module:
    """Return it quantized."""
    recipe = replace(
        Recipe.named(name), method="lqer", rules=(Rule(match="head", skip=True),), effort="default"
    )
    model = net()
    loraq.quantize_(model, recipe, progress=False)
    return model


def relist(folder: Path) -> None:
    """Make the hashes of a manifest right again, as a stranger would."""
    path = folder / FILE_NAME
    content = json.loads(path.read_text())
    content["files"] = {
        file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in folder.iterdir()
        if file.name != FILE_NAME and file.is_file() and file.stat().st_size < 10**6
    }
    path.write_text(json.dumps(content))


def require(condition: object, what: str) -> None:
    """Raise `AssertionError` where something that cannot be justified was accepted."""
    if not condition:
        raise AssertionError(f"accepted, but {what}")


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


class OneFile(Reader):
    """A safetensors file; what is accepted is what the library of that name reads."""

    share = 10

    def make(self, folder: Path) -> None:
        tensors = {
            "w": torch.arange(12.0).view(3, 4),
            "b": torch.ones(4, dtype=torch.bfloat16),
            "n": torch.tensor([1, 2]),
            "flag": torch.tensor(True),
            "empty": torch.ones(0, 3),
            "packed": torch.arange(16, dtype=torch.uint8),
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "x": "y"})

    def read(self, folder: Path) -> None:
        reader = ShardReader(folder)
        theirs = load_file(folder / "model.safetensors")
        require(set(reader.names) == set(theirs), "the safetensors library finds other names")
        for name in reader.names:
            tensor = reader.read(name)
            require(tensor.dtype == DTYPES[reader.dtype(name)], f"{name} has another dtype")
            require(same_bytes(tensor, theirs[name]), f"the safetensors library reads {name} else")


class Shards(Reader):
    """Shards and their index; what is accepted has the tensors that were written."""

    def make(self, folder: Path) -> None:
        tensors = {f"layers.{i}.weight": torch.full((4, 4), float(i)) for i in range(6)}
        write_shards(tensors, folder, "model", 150)

    def mutate(self, random: Random, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if random.random() < 0.6:
            m.mutate_json_file(random, index)
        else:
            super().mutate(random, folder)

    def read(self, folder: Path) -> None:
        reader = ShardReader(folder)
        for name in reader.names:
            theirs = load_file(reader.file_of(name))[name]
            require(same_bytes(reader.read(name), theirs), f"{name} is read from elsewhere")


def small_pixart_config() -> dict[str, Any]:
    """Return what the small PixArt's config.json says."""
    from small.pixart import small_pixart

    return json.loads(small_pixart().to_json_string())


class Configuration(Reader):
    """config.json, and the model that it describes."""

    share = 4

    def make(self, folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(small_pixart_config()))
        save_file({"a": torch.ones(1)}, folder / FLOAT_WEIGHTS)

    def mutate(self, random: Random, folder: Path) -> None:
        m.mutate_json_file(random, folder / CONFIG)

    def read(self, folder: Path) -> None:
        model = empty_model(folder)
        require(isinstance(model, nn.Module), "that is no model")
        require(len(list(model.parameters())) < 1100, "the weights have fewer parameters")


class Pipeline(Reader):
    """A float pipeline, located and planned with its weights, as `quantize` does before work."""

    share = 3

    def make(self, folder: Path) -> None:
        from small.pixart import small_pixart

        small_pixart().save_pretrained(folder / "transformer")
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text('{"a": 1}')
        index = {"_class_name": "PixArtSigmaPipeline", "transformer": ["diffusers", "PixArt"]}
        (folder / "model_index.json").write_text(json.dumps(index))

    def read(self, folder: Path) -> None:
        (source,) = checkpoints.locate(folder).open(Recipe.named("mxfp4+w8a8-r4")).sources.values()
        source.require_layers()
        hashes = source.hash_weights()
        layers = {f"{job.name}.weight" for job in source.plan.quantized}
        require(layers <= hashes.keys(), "layers have no weights")
        drawing.pipeline_class(folder)


class UnknownSource(Reader):
    """A float folder of a model that nobody knows, as `quantize` reads it."""

    def make(self, folder: Path) -> None:
        save_file(net().state_dict(), folder / "model.safetensors")
        (folder / CONFIG).write_text(json.dumps({"width": 32}))

    def read(self, folder: Path) -> None:
        (source,) = checkpoints.locate(folder).open(Recipe.named("mxfp4")).sources.values()
        source.require_layers()
        for job in source.plan.quantized:
            weight = source.reader.read(f"{job.name}.weight")
            require(weight.is_floating_point() and weight.numel(), f"{job.name} is no float matrix")
        source.hash_weights()


class Folder(Reader):
    """A quantized folder, into a model that is known: `Manifest`, `load_into`, `inspect`."""

    share = 8
    #: What is changed; hashes are made right again after weights were.
    targets: tuple[str, ...] = (FILE_NAME,)

    def make(self, folder: Path) -> None:
        folder.rmdir()
        loraq.save(quantized_net(), folder)

    def mutate(self, random: Random, folder: Path) -> None:
        if "model.safetensors" in self.targets:
            change = random.choice((m.mutate_safetensors, m.mutate_tensors))
            change(random, folder / "model.safetensors")
            if random.random() < 0.95:
                relist(folder)
        if FILE_NAME in self.targets:
            m.mutate_json_file(random, folder / FILE_NAME)

    def read(self, folder: Path) -> None:
        model = net()
        try:
            loraq.load_into(model, folder)
        except LoraqError as error:
            require_untouched(model)
            refused = error
        else:
            refused = None
            require_as_stored(model, folder)
        try:
            read_checked(folder)
            measure_memory(folder)
        except LoraqError:
            if refused is None:
                # The model has shapes of its own, so what it takes fits; notes may be wrong.
                return
        if refused is not None:
            raise refused


class FolderWeights(Folder):
    """The same with other weights, and hashes that are right."""

    targets = ("model.safetensors",)


class FolderBoth(Folder):
    """The same with other weights and another manifest."""

    targets = ("model.safetensors", FILE_NAME)


def require_untouched(model: nn.Module) -> None:
    """Require that a refusal left a model as it was."""
    before, after = net().state_dict(), model.state_dict()
    require(list(before) == list(after), "refusing changed the model's names")
    require(all(same_bytes(after[k], before[k]) for k in before), "refusing changed the model")


def require_as_stored(model: nn.Module, folder: Path) -> None:
    """Require that a loaded model has the schemes of the manifest, and the tensors of the files."""
    manifest, reader = Manifest.read(folder, verify=False), ShardReader(folder)
    layers = quantized_layers(model)
    require(layers.keys() == manifest.layers.keys(), "other layers are quantized")
    for name, layer in layers.items():
        stored = manifest.layers[name]
        require(layer.scheme == stored.scheme, f"'{name}' has another scheme")
        require((layer.out_features, layer.in_features) == stored.shape, f"'{name}' is of a shape")
        require(layer.reconstruct().isfinite().all(), f"'{name}' has weights that are no numbers")
    state = model.state_dict()
    require({*reader.names, *manifest.tied} == set(state), "tensors of the files are not loaded")
    for name, tensor in state.items():
        stored_tensor = reader.read(manifest.tied.get(name, name))
        # Loaders widen floats of mixed dtypes, which changes no number.
        widest = torch.promote_types(tensor.dtype, stored_tensor.dtype)
        if tensor.is_floating_point() and widest == tensor.dtype:
            stored_tensor = stored_tensor.to(widest)
        require(same_bytes(tensor, stored_tensor), f"'{name}' is not what the file has")


class Load(Folder):
    """A quantized transformer of diffusers by `loraq.load`: its configuration and its manifest."""

    share = 3

    def make(self, folder: Path) -> None:
        from small.pixart import small_pixart

        model = small_pixart()
        loraq.quantize_(
            model, replace(Recipe.named("mxfp4+w8a8-r4"), method="lqer"), progress=False
        )
        folder.rmdir()
        loraq.save(model, folder)

    def mutate(self, random: Random, folder: Path) -> None:
        kind = random.choice(("config", "config", "manifest", "weights", "any"))
        if kind == "config":
            m.mutate_json_file(random, folder / CONFIG)
        elif kind == "manifest":
            m.mutate_json_file(random, folder / FILE_NAME)
            return
        elif kind == "weights":
            m.mutate_tensors(random, folder / FLOAT_WEIGHTS)
        else:
            Reader.mutate(self, random, folder)
            return
        relist(folder)

    def read(self, folder: Path) -> None:
        require_as_stored(loraq.load(folder), folder)


class QuantizationConfig(Load):
    """The same by diffusers' own `from_pretrained`, whatever the configuration calls itself."""

    share = 2

    def mutate(self, random: Random, folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        value = {"quant_method": "loraq", "recipe": Recipe.named("mxfp4").to_dict()}
        short = config["quantization_config"]
        said = random.choice((value, value, short, {}, None))
        text = m.mutate_tree(random, {"quantization_config": said})
        try:
            changed = json.loads(text)
        except (ValueError, RecursionError):
            changed = {}
        if not isinstance(changed, dict):
            changed = {}
        said = json.dumps(changed.get("quantization_config"))
        if "quantization_config" in changed and len(said) < 10_000:
            config["quantization_config"] = changed["quantization_config"]
        else:
            del config["quantization_config"]
        (folder / CONFIG).write_text(json.dumps(config))
        if random.random() < 0.3:
            m.mutate_json_file(random, folder / FILE_NAME)
            return
        relist(folder)

    def read(self, folder: Path) -> None:
        import diffusers

        import loraq.diffusers  # noqa: F401 (registers the quantizer)

        model = diffusers.PixArtTransformer2DModel.from_pretrained(folder)
        require_as_stored(model, folder)


class LoraFile(Reader):
    """A LoRA with an alpha and a configuration in its header; nothing of it may be dropped."""

    share = 8

    def make(self, folder: Path) -> None:
        tensors = {
            f"transformer.{layer}.{part}.weight": torch.ones(shape)
            for layer in ("blocks.0.to_q", "blocks.1.to_q")
            for part, shape in (("lora_A", (2, 6)), ("lora_B", (4, 2)))
        }
        tensors["transformer.blocks.0.to_q.alpha"] = torch.tensor(4.0)
        tensors["text_encoder.q.lora_A.weight"] = torch.ones(2, 2)
        (folder / "header.json").write_text(json.dumps(self.options))
        (folder / "adapter_config.json").write_text(json.dumps(self.options))
        save_file(tensors, folder / "adapter_model.safetensors")

    options: dict[str, Any] = {  # noqa: RUF012 (a constant)
        "r": 2,
        "lora_alpha": 8,
        "alpha_pattern": {"blocks.1.to_q": 4},
        "rank_pattern": {"to_k": 16},
        "use_dora": False,
        "use_rslora": True,
        "target_modules": ["to_q"],
    }

    def mutate(self, random: Random, folder: Path) -> None:
        weights, beside = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        header = folder / "header.json"
        kind = random.choice(("weights", "tensors", "beside", "header"))
        if kind == "weights":
            m.mutate_safetensors(random, weights)
        elif kind == "tensors":
            m.mutate_tensors(random, weights)
        elif kind == "beside":
            m.mutate_json_file(random, beside)
        else:
            text = m.mutate_tree(random, json.loads(header.read_text()))
            text = text.encode("utf-8", "replace").decode()
            save_file(load_file(weights), weights, metadata={"lora_adapter_metadata": text})
        header.unlink()

    def read(self, folder: Path) -> None:
        lora = Lora.read(folder)
        used = {id(part) for adapter in lora.adapters.values() for part in adapter_parts(adapter)}
        names = ShardReader(lora.file).names
        factors = [n for n in names if not n.endswith("alpha") and not n.startswith("text_enc")]
        require(len(used) == len(factors), "factors were dropped")
        require(bool(lora.others) == any(n.startswith("text_enc") for n in names), "a component is")
        for name, adapter in lora.adapters.items():
            require(adapter.delta().isfinite().all(), f"'{name}' adds what is no number")


def adapter_parts(adapter: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two factors of an adapter."""
    return adapter.down, adapter.up


class Statistics(Reader):
    """A file of statistics."""

    def make(self, folder: Path) -> None:
        stats = {
            "a": ActivationStats(5, torch.eye(4)),
            "b": ActivationStats(7, torch.ones(3)),
            "c": ActivationStats(7, torch.ones(3), torch.ones(2)),
            "d": ActivationStats(7, torch.ones(3), call_mean_squares=torch.ones(16, 3)),
        }
        save_stats(stats, folder / "stats.safetensors")

    def mutate(self, random: Random, folder: Path) -> None:
        if random.random() < 0.6:
            m.mutate_safetensors(random, folder / "stats.safetensors")
        else:
            path = folder / "stats.safetensors"
            m.mutate_tensors(random, path)
            save_file(load_file(path), path, metadata={"loraq_stats": "1"})

    def read(self, folder: Path) -> None:
        stats = load_stats(folder / "stats.safetensors")
        for layer in stats:
            found = stats[layer]
            require(found.tokens > 0 and found.second_moment.isfinite().all(), f"'{layer}' is none")


class Recipes(Reader):
    """Recipe files in JSON and TOML, and names; what is accepted survives a round trip."""

    share = 8

    def make(self, folder: Path) -> None:
        recipe = replace(
            Recipe.named("mxfp4+w8a8-r4"),
            options={"steps": 10},
            rules=(Rule(match="*.to_q", skip=True), Rule(match="x", branch={"rank": 3})),
        )
        (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
        (folder / "recipe.toml").write_text(
            'seed = 3\nbudget = 5.25\n[scheme]\nweight = "mxfp4"\n'
            'activation = "mxint8"\nbranch = {rank = 4, weight = "mxint8"}\n'
            '[[rules]]\nmatch = "head"\nskip = true\n[options]\n'
        )
        (folder / "name").write_text("mxfp4-a8+w8a8-r4-h32")

    def mutate(self, random: Random, folder: Path) -> None:
        name = random.choice(("recipe.json", "recipe.json", "recipe.toml", "name"))
        for other in {"recipe.json", "recipe.toml", "name"} - {name}:
            (folder / other).unlink()
        path = folder / name
        if name == "name":
            text = m.mutate_bytes(random, path.read_bytes()).decode("latin-1")
            text = random.choice((text, text * 500, random.choice(m.TEXTS)))
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
        elif name == "recipe.json":
            m.mutate_json_file(random, path)
        else:
            text = path.read_text()
            old = random.choice(('"mxfp4"', "4", "true", "5.25", "3", '"head"', "{"))
            new = random.choice(("1" * 5000, "nan", "inf", "[" * 500, '"\\u001b[2J"', "-1", "[]"))
            path.write_bytes(
                text.replace(old, new, 1).encode()
                if random.random() < 0.5
                else m.mutate_bytes(random, text.encode())
            )

    def read(self, folder: Path) -> None:
        (path,) = folder.iterdir()
        if path.name == "name":
            name = path.read_bytes().decode("utf-8", "surrogatepass")
            recipe = Recipe.named(name)
        else:
            recipe = Recipe.read(path)
        require(Recipe.from_dict(recipe.to_dict()) == recipe, "a round trip changes it")


class Comparison(Reader):
    """Two folders, one of which is mutated."""

    share = 4

    def make(self, folder: Path) -> None:
        (folder / "float").mkdir()
        save_file(net().state_dict(), folder / "float" / "model.safetensors")
        loraq.save(quantized_net("nvfp4+bf16-r4"), folder / "quantized")

    def mutate(self, random: Random, folder: Path) -> None:
        kind = random.choice(("float", "float", "quantized", "manifest", "any"))
        if kind == "any":
            super().mutate(random, folder)
        elif kind == "manifest":
            m.mutate_json_file(random, folder / "quantized" / FILE_NAME)
        else:
            m.mutate_tensors(random, folder / kind / "model.safetensors")
            if kind == "quantized":
                relist(folder / kind)

    def read(self, folder: Path) -> None:
        for difference in compare(folder / "float", folder / "quantized"):
            # Zeros in place of weights differ infinitely.
            require(difference.relative_error >= 0, f"'{difference.name}' differs by no number")


class JournalOfARun(Reader):
    """The journal of an interrupted run; what is accepted is what was written, or its beginning."""

    share = 6
    layers = tuple(
        {"name": f"layers.{i}", "relative_error": 0.1 * i, "nbytes": i} for i in range(4)
    )

    def make(self, folder: Path) -> None:
        with resumable(folder) as partial:
            for layer in self.layers:
                partial.journal.note(layer)
            shutil.copytree(partial.path, folder / ".kept.partial")
        shutil.rmtree(folder / "out")

    def mutate(self, random: Random, folder: Path) -> None:
        path = folder / ".kept.partial" / "journal.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        place, kind = random.randrange(len(lines)), random.randrange(4)
        if kind == 0:
            random.shuffle(lines)
        elif kind == 1:
            check, _, text = lines[place].partition(b" ")
            changed = m.mutate_tree(random, json.loads(text)).replace("\n", " ")
            lines[place] = check + b" " + changed.encode("utf-8", "surrogatepass") + b"\n"
        elif kind == 2:
            lines = lines[place:] + lines[: random.randrange(len(lines))]
        content = b"".join(lines)
        path.write_bytes(content if kind < 3 else m.mutate_bytes(random, content))

    def read(self, folder: Path) -> None:
        (folder / ".kept.partial").rename(folder / ".out.partial")
        with resumable(folder) as partial:
            found = tuple(partial.journal.layers.values())
            require(found == self.layers[: len(found)], f"other layers than were noted: {found}")


def resumable(folder: Path) -> AbstractContextManager[PartialFolder]:
    """Return the partial folder of a target in a folder."""
    return resumable_folder(folder / "out", {"recipe": {"seed": 0}}, 4)


READERS: dict[str, Callable[[], Reader]] = {
    "one-file": OneFile,
    "shards": Shards,
    "config": Configuration,
    "pipeline": Pipeline,
    "unknown-source": UnknownSource,
    "manifest": Folder,
    "weights": FolderWeights,
    "manifest-and-weights": FolderBoth,
    "load": Load,
    "quantization-config": QuantizationConfig,
    "lora": LoraFile,
    "stats": Statistics,
    "recipe": Recipes,
    "compare": Comparison,
    "journal": JournalOfARun,
}


def copy_files(valid: Path, folder: Path) -> Path:
    """Return a fresh copy of valid files."""
    if folder.exists():
        shutil.rmtree(folder)
    return Path(shutil.copytree(valid, folder))
