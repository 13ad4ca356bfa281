"""What targets have in common that are the graph of one forward: everything but codes is fp32."""

from typing import ClassVar

from loraq.exports.graph_files import GraphFiles
from loraq.exports.layer import Specs
from loraq.exports.target import Job, Target
from loraq.exports.trace import example_inputs

#: What is true of any graph of one forward.
TRAPS = (
    "The graph is that of one forward: text encoder, scheduler and VAE are not in it.",
    "Batch and number of text tokens are free, and FLUX's image tokens; height and width of "
    "latents are `sample_size` in `config.json`. Prompts come without padding.",
)
#: Settings with which OpenVINO rounds no activation, in Python.
EXACT = 'exact = {{"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}}\n'


class GraphTarget(Target):
    """A graph, and a file beside it with its numbers."""

    dtypes = ("float32",)
    #: Name of the graph.
    graph_file: ClassVar[str]

    def __init__(self, job: Job) -> None:
        """Look at the class, whose inputs must be known.

        Raises:
            ExportError: they are not.
        """
        super().__init__(job)
        self.inputs, self.fixed = example_inputs(job.model_class, job.config)

    def build(self, files: GraphFiles) -> GraphFiles:
        """Return the files with the graph, and with the numbers that are its own.

        Raises:
            ExportError: there is no such graph of this model.
            MissingLibraryError: what makes it is not installed.
        """
        raise NotImplementedError

    def layout(self, specs: Specs, shard_bytes: int) -> GraphFiles:
        """Build the graph, with places instead of numbers."""
        return self.build(GraphFiles.lay_out((self.graph_file, self.one_file), specs))
