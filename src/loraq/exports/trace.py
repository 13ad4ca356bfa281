"""One forward of a model as a program of torch, made without the weights.

Every parameter is a fake tensor, which has a shape and no numbers.
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from loraq.errors import ExportError
from loraq.layers import quantized_layers
from loraq.nn import QuantizedConv1x1


class _Call(nn.Module):
    """A model with fixed arguments beside its inputs, which returns a tensor.

    Its program takes tensors that are named as inputs, too.
    """

    def __init__(self, model: nn.Module, fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.fixed = model, dict(fixed)

    def forward(self, inputs: dict[str, Tensor], named: dict[str, Tensor]) -> Tensor:
        given = {**inputs, **self.fixed, "return_dict": False}
        result: Tensor = torch.func.functional_call(self.model, named, (), given)[0]
        return result


def replace_layers(model: nn.Module, made: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of a model with other layers in place of quantized ones.

    Args:
        model: on the meta device, its quantized layers empty.
        made: new layers by name; all other quantized layers become float ones.
    """
    model, new = copy.deepcopy(model), dict(made)
    for name, layer in quantized_layers(model).items():
        if name not in new:
            sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
            new[name] = (
                nn.Conv2d(*sizes, 1, bias=bias, device="meta")
                if isinstance(layer, QuantizedConv1x1)
                else nn.Linear(*sizes, bias=bias, device="meta")
            )
    for name, instead in new.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, instead)
    return model.eval()


def trace(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    fixed: Mapping[str, Any],
    lifted: Sequence[str] = (),
) -> torch.export.ExportedProgram:
    """Return a program whose parameters are fake.

    Args:
        model: on the meta device; its parameters become fake ones in fp32.
        inputs: examples; images and tokens may be more or fewer, height and width are as they are,
            because tables of positions are made for them.
        fixed: other arguments of the forward.
        lifted: parameters and buffers that become inputs of the program, behind its others.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with mode:
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    fake = _fake(parameter)
                    module._parameters[leaf] = nn.Parameter(fake, requires_grad=False)
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        given = {name: _fake(named[name]) for name in lifted}
    shapes = {
        name: {
            axis: torch.export.Dim.AUTO for axis, size in enumerate(tensor.shape[:2]) if size > 1
        }
        for name, tensor in inputs.items()
    }
    with torch.no_grad(), mode:
        program = torch.export.export(
            _Call(model, fixed),
            (dict(inputs), given),
            dynamic_shapes=(shapes, dict.fromkeys(given)),
            strict=False,
        )
    _fold_tables(program)
    return program


def _fold_tables(program: torch.export.ExportedProgram) -> None:
    """Let tables that the forward computes of nothing, such as frequencies, be torch's numbers.

    An engine's own exponential may differ in the last bit, which a timestep of 1000 makes an error
    of 1e-4 in an angle.
    """
    graph, known = program.graph, dict[Node, Tensor]()
    for node in graph.nodes:
        parts = [part for part in tree_leaves((node.args, node.kwargs)) if isinstance(part, Node)]
        if node.op == "call_function" and all(part in known for part in parts):
            args, kwargs = tree_map(lambda part: known.get(part, part), (node.args, node.kwargs))
            value = node.target(*args, **kwargs)
            if isinstance(value, Tensor):
                known[node] = value
    first, specs = next(iter(graph.nodes)), program.graph_signature.input_specs
    edge = {node: value for node, value in known.items() if not node.users.keys() <= known.keys()}
    for i, (node, value) in enumerate(edge.items()):
        name = f"table_{i}"
        with graph.inserting_before(first):
            placeholder = graph.placeholder(name)
        placeholder.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(placeholder)
        argument = TensorArgument(placeholder.name)
        specs.insert(i, InputSpec(InputKind.CONSTANT_TENSOR, argument, name))
        program.constants[name] = value
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _fake(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="cpu")


@contextmanager
def quiet(model: nn.Module, what: str) -> Iterator[None]:
    """Silence warnings and logs of a conversion, and name the model where it fails.

    Raises:
        ExportError: it fails.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # libraries raise what they like on models that they do not follow
        raise ExportError(
            f"{type(model).__name__} cannot be made a graph of {what}: {type(error).__name__}: "
            f"{error}. Use another target (`loraq export --list`)."
        ) from error
    finally:
        logging.disable(before)


def example_inputs(
    model_class: str, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return inputs of a model's forward by its configuration, and its other arguments.

    Raises:
        ExportError: the class is not known here.
    """
    batch, tokens, text = 2, 64, 24
    side, channels = config.get("sample_size"), config.get("in_channels")
    inputs = {"timestep": torch.ones(batch)}
    if model_class == "FluxTransformer2DModel":
        inputs |= {
            "hidden_states": torch.zeros(batch, tokens, int(channels or 0)),
            "encoder_hidden_states": torch.zeros(batch, text, config["joint_attention_dim"]),
            "pooled_projections": torch.zeros(batch, config["pooled_projection_dim"]),
            "img_ids": torch.zeros(tokens, 3),
            "txt_ids": torch.zeros(text, 3),
        }
        if config.get("guidance_embeds"):
            inputs["guidance"] = torch.ones(batch)
        return inputs, {}
    of_text = {"SD3Transformer2DModel": "joint_attention_dim"}.get(model_class, "caption_channels")
    known = ("PixArtTransformer2DModel", "SanaTransformer2DModel", "SD3Transformer2DModel")
    if model_class not in known or config.get("use_additional_conditions"):
        raise ExportError(
            f"The inputs of {model_class} with this configuration are not known to targets that "
            f"are one graph. Known are FluxTransformer2DModel, {', '.join(known)}. Use another "
            "target (`loraq export --list`)."
        )
    inputs |= {
        "hidden_states": torch.zeros(batch, int(channels or 0), int(side or 0), int(side or 0)),
        "encoder_hidden_states": torch.zeros(batch, text, config[of_text]),
    }
    if model_class == "SD3Transformer2DModel":
        inputs["pooled_projections"] = torch.zeros(batch, config["pooled_projection_dim"])
    is_pixart = model_class == "PixArtTransformer2DModel"
    conditions = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return inputs, conditions if is_pixart else {}
