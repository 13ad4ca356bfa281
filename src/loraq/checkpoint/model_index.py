"""`model_index.json`: which components a pipeline has, and which of them are worth quantizing.

A pipeline is what this file names, component by component: `"vae": ["diffusers", "AutoencoderKL"]`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraq.checkpoint.folder import read_object
from loraq.checkpoint.links import require_own_weights
from loraq.checkpoint.manifest import FILE_NAME
from loraq.errors import CheckpointError, list_some
from loraq.json_files import read_json
from loraq.regular_file import is_plain_name

INDEX = "model_index.json"
#: What the name or the class of a component contains that denoises: quantized by default.
DENOISERS = ("transformer", "unet")
#: What the name of a component contains that reads the prompt: quantized on request, by "all".
TEXT_ENCODERS = ("text_encoder", "language_model", "llm")


@dataclass(frozen=True)
class Component:
    """A component that a pipeline names."""

    folder: Path
    #: Where its class is from, such as "diffusers" or "transformers".
    package: str
    class_name: str

    @property
    def name(self) -> str:
        """Its name, which is that of its folder."""
        return self.folder.name

    @property
    def is_denoiser(self) -> bool:
        """Whether it is a transformer or a U-Net."""
        return is_denoiser(self.name, self.package, self.class_name)

    @property
    def is_text_encoder(self) -> bool:
        """Whether it reads the prompt, and is no tokenizer."""
        return is_text_encoder(self.name, self.package)

    @property
    def is_model(self) -> bool:
        """Whether there is a folder with a configuration or weights."""
        return (self.folder / "config.json").is_file() or any(self.folder.glob("*.safetensors"))

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are quantized, by loraq or by others."""
        return is_quantized(self.folder)

    @property
    def is_packed(self) -> bool:
        """Whether its weights are quantized by loraq."""
        return is_packed(self.folder)

    def __str__(self) -> str:
        return f"{self.name} ({self.class_name})"


def is_denoiser(name: str, package: str, class_name: str) -> bool:
    """Return whether a component is a transformer or a U-Net, by its name and class."""
    said = f"{name} {class_name}".lower()
    return package != "transformers" and any(word in said for word in DENOISERS)


def is_text_encoder(name: str, package: str) -> bool:
    """Return whether a component is a model of transformers that reads the prompt."""
    return package == "transformers" and any(word in name for word in TEXT_ENCODERS)


def is_pipeline(folder: Path) -> bool:
    """Return whether a folder is a pipeline's."""
    return (folder / INDEX).is_file()


def is_quantized(folder: Path) -> bool:
    """Return whether a model's folder holds quantized weights.

    Its configuration says so. A float model that was saved over a quantized one leaves a
    `loraq.json` that belongs to nothing; it counts only where no configuration says more.
    """
    config = read_object(folder / "config.json")
    return "quantization_config" in config or (not config and (folder / FILE_NAME).is_file())


def is_packed(folder: Path) -> bool:
    """Return whether a model's folder holds weights that loraq packed, or says that it does."""
    file = folder / "config.json"
    if not file.is_file():
        return (folder / FILE_NAME).is_file()
    said = read_object(file).get("quantization_config")
    return isinstance(said, dict) and said.get("quant_method") == "loraq"


def read_components(root: Path) -> dict[str, Component]:
    """Return the components that a pipeline names, by their names, in the order of its index.

    Raises:
        CheckpointError: the index cannot be read, or names what is no folder's name.
    """
    found = {}
    for name, entry in read_json(root / INDEX).items():
        is_entry = isinstance(entry, list) and len(entry) >= 2
        if not is_entry or not all(isinstance(part, str) for part in entry[:2]):
            continue  # a setting, or a component that the pipeline does without: [null, null]
        if not is_plain_name(name):
            raise CheckpointError(
                f"'{root / INDEX}' names the component '{list_some([name])}', which is no "
                "folder's name. Download it again."
            )
        found[name] = Component(root / name, entry[0], entry[1])
    return found


def choose_components(
    root: Path, asked: str | Sequence[str] | None
) -> tuple[list[Component], list[Component]]:
    """Choose what of a pipeline is quantized.

    Args:
        root: folder of the pipeline.
        asked: names of components, or one text of them with commas between; "all" for denoisers
            and text encoders; `None` for denoisers.

    Returns:
        The components to quantize in the order of the index, and those that were meant too, but are
        quantized already.

    Raises:
        CheckpointError: there is no such component, it is no model, a link leads out of the
            pipeline, it is quantized already, or nothing is left to quantize.
    """
    components = read_components(root)
    names = choose_names(
        {name: (part.package, part.class_name) for name, part in components.items()}, asked
    )
    chosen = [part for name, part in components.items() if name in names]
    if absent := [part.name for part in chosen if not part.is_model]:
        raise CheckpointError(
            f"'{root}' has no model in {list_some(absent)}: neither 'config.json' nor weights. "
            f"Download it again, or name other components (`--components`); there are "
            f"{_list_models(components)}."
        )
    for part in chosen:
        require_own_weights(root, part.folder)
    done = [part for part in chosen if part.is_quantized]
    is_by_name = asked is not None and _split(asked) != ["all"]
    if done and (is_by_name or len(done) == len(chosen)):
        raise CheckpointError(
            f"'{root}' is quantized already ({', '.join(part.name for part in done)}). Start from "
            "the float weights, or name other components (`--components`)."
        )
    return [part for part in chosen if part not in done], done


def choose_names(
    kinds: Mapping[str, tuple[str, str]], asked: str | Sequence[str] | None
) -> list[str]:
    """Return which components of a pipeline are meant, in their order.

    Args:
        kinds: package and class of every component, by name.
        asked: as for `choose_components`.

    Raises:
        CheckpointError: there is no such component, or none is a denoiser.
    """
    names = None if asked is None else _split(asked)
    if names is not None and names != ["all"]:
        wrong = [name for name in names if name not in kinds]
        if wrong or not names:
            raise CheckpointError(
                f"The pipeline has no component {list_some(wrong or [str(asked)])}. It has "
                f"{list_some(kinds) or 'none'}; `all` stands for its denoisers and text encoders."
            )
        return [name for name in kinds if name in names]
    found = [name for name, kind in kinds.items() if is_denoiser(name, *kind)]
    if names == ["all"]:
        found += [name for name, kind in kinds.items() if is_text_encoder(name, kind[0])]
    if not found:
        raise CheckpointError(
            "The pipeline has no transformer and no U-Net. Name what is to be quantized "
            f"(`--components`, `components=`) of {list_some(kinds) or 'none'}."
        )
    return [name for name in kinds if name in found]


def choose_model(root: Path, component: str | None, *, quantized: bool = False) -> Component:
    """Return the one component of a pipeline that is meant.

    Args:
        root: folder of the pipeline.
        component: its name; `None` takes the only denoiser.
        quantized: whether a quantized one is meant: then it may be another if no denoiser is.

    Raises:
        CheckpointError: there is no such component, none or several come into question.
    """
    components = read_components(root)
    if component is not None:
        if component in components and components[component].is_model:
            return components[component]
        raise CheckpointError(
            f"The pipeline '{root}' has no model '{component}'. It has {_list_models(components)}."
        )
    models = [part for part in components.values() if part.is_model]
    found = [part for part in models if part.is_denoiser]
    if quantized:
        done = [part for part in models if part.is_packed]
        found = [part for part in done if part.is_denoiser] or done or found
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(
            f"The pipeline '{root}' has no transformer and no U-Net. Give the folder of the model "
            f"itself; there are {_list_models(components)}."
        )
    raise CheckpointError(
        f"The pipeline '{root}' has {len(found)} models: {', '.join(map(str, found))}. Say which "
        "(`--component`, `component=`), or give its folder."
    )


def list_apart(root: Path, components: Collection[str], weights: Sequence[str]) -> list[str]:
    """Return what lies in a pipeline's folder and is not of the pipeline.

    Such are folders that it does not name, and weights beside its index. Other files, such as a
    licence, belong to it.

    Args:
        root: folder of the pipeline.
        components: names of its components.
        weights: patterns of the names of weight files.
    """
    files = {path for pattern in weights for path in root.glob(pattern)}
    return sorted(
        path.name
        for path in root.iterdir()
        if path in files or (path.is_dir() and path.name not in components)
    )


def _split(asked: str | Sequence[str]) -> list[str]:
    names = asked.split(",") if isinstance(asked, str) else asked
    return [name.strip() for name in names if name.strip()]


def _list_models(components: Mapping[str, Component]) -> str:
    return ", ".join(str(part) for part in components.values() if part.is_model) or "none"
