"""Where a quantized model lies: alone, or in a pipeline with other components."""

from pathlib import Path
from typing import NamedTuple

from loraq.checkpoint.links import find_files, require_own_weights
from loraq.checkpoint.model_index import is_pipeline, list_apart, read_components
from loraq.integrations.diffusers import model_folder
from loraq.safetensors.selection import WEIGHT_FILES


class Folder(NamedTuple):
    """The folder of a quantized model, and the rest of the pipeline that it is in."""

    path: Path
    #: Its name in the pipeline, "" for a model that stands alone.
    component: str
    #: The pipeline's other files, by their path in it.
    others: dict[str, Path]

    @classmethod
    def find(cls, root: Path, component: str | None) -> "Folder":
        """Find the model that is meant.

        Raises:
            CheckpointError: there is no such one, it is not clear which is meant, or links lead out
                of the folder.
        """
        if not is_pipeline(root):
            folder = model_folder(root, component)
            require_own_weights(root, folder)
            return cls(folder, "", {})
        components = read_components(root)
        for part in components.values():
            require_own_weights(root, part.folder)
        folder = model_folder(root, component, quantized=True)
        apart = list_apart(root, components, WEIGHT_FILES)
        others = find_files(root, without={folder.name, *apart})
        return cls(folder, folder.name, others)
