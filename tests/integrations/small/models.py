"""Every transformer class of diffusers, small: a configuration, and inputs for its forward.

Both follow general rules, by the names of arguments; `OWN` holds what a class needs besides.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from small.images import IMAGES
from small.needs import BATCH, FRAMES, HEAD_DIM, HEADS, SIDE, TEXT, WIDTH, Own, rand
from small.others import OTHERS
from small.videos import VIDEOS
from torch import Tensor, nn

OWN: dict[str, Own] = IMAGES | VIDEOS | OTHERS

#: Names of constructor arguments by the value that they get, wherever a class has such an argument.
NAMES: tuple[tuple[int, str], ...] = (
    (
        1,
        """num_layers num_single_layers num_mmdit_layers num_single_dit_layers n_layers n_refiner_layers
        num_refiner_layers num_hidden_layers mmdit_layers depth num_text_blocks num_visual_blocks nlayers dit_depth
        approximator_layers num_refiner_text_blocks num_layerwise_text_blocks perceiver_num_layers""",
    ),
    (
        HEADS,
        """num_attention_heads num_heads n_heads n_kv_heads num_key_value_heads num_kv_heads nheads dit_heads
        num_cross_attention_heads num_key_value_attention_heads text_num_attention_heads text_num_key_value_heads
        audio_num_attention_heads face_encoder_num_heads""",
    ),
    (
        HEAD_DIM,
        """attention_head_dim head_dim cross_attention_head_dim audio_attention_head_dim
        time_embed_dim freq_dim time_dim timestep_embed_dim time_step_dim timestep_channels adaln_dim adaln_lora_dim
        timestep_guidance_channels timestep_features_dim time_proj_dim fourier_embedding_dim
        approximator_num_channels multiple_of""",
    ),
    (
        WIDTH,
        """hidden_size dim inner_dim model_dim dit_dim embed_dim token_dim cross_attention_dim
        caption_projection_dim audio_cross_attention_dim text_hidden_dim approximator_hidden_dim""",
    ),
    (
        2 * WIDTH,
        "intermediate_size ffn_dim ffn_hidden_size ff_dim text_intermediate_size ff_inner_dim",
    ),
    (
        24,
        """joint_attention_dim text_embed_dim text_dim caption_channels cap_feat_dim context_in_dim text_in_dim
        pooled_projection_dim in_text_dim in_text_dim2 llm_features_dim condition_dim cond_token_dim
        global_cond_dim dit_text_dim text_emb_dim text_encoder_dim""",
    ),
    (8, "in_channels out_channels latent_channels in_visual_dim out_visual_dim"),
    (SIDE, "sample_size sample_height sample_width"),
    (FRAMES, "sample_frames"),
    (40, "vocab_size"),
)
VALUES = {name: value for value, names in NAMES for name in names.split()}
#: Sizes of the axes of rotary embeddings, which share the dimension of a head, by their number.
ROPE = {2: (8, 8), 3: (4, 6, 6), 4: (4, 4, 4, 4)}
ROPE_NAMES = (
    "axes_dims_rope axes_dims rope_axes_dim axes_dim_rope rope_dim_list axes_dim rope_dim".split()
)
#: Names under which a configuration has the width of its latents and of its text, the first that is
#: there counts.
CHANNELS = "in_channels in_visual_dim in_dim io_channels latent_dim embedding_dim inner_dim".split()
TEXT_WIDTH = """joint_attention_dim caption_channels text_embed_dim text_dim cap_feat_dim text_in_dim context_in_dim
    in_text_dim text_hidden_dim cross_attention_dim llm_features_dim cond_token_dim""".split()


def small_model(kind: type[nn.Module]) -> nn.Module:
    """Return a small model of a class with seeded random weights."""
    torch.manual_seed(0)
    model = kind(**_small_config(kind)).eval()
    for (
        parameter
    ) in model.parameters():  # none may be zero: a zero gate would hide what is behind it
        if parameter.is_floating_point():
            nn.init.normal_(parameter.data, std=0.2)
    return model


def run(model: nn.Module) -> list[Tensor]:
    """Return all tensors that a small model makes of its small inputs."""
    tuple_please = (
        {"return_dict": False}
        if "return_dict" in inspect.signature(model.forward).parameters
        else {}
    )
    with torch.no_grad():
        return list(_tensors(model(**_small_inputs(model), **tuple_please)))


def _small_config(kind: type[nn.Module]) -> dict[str, Any]:
    arguments = inspect.signature(kind.__init__).parameters
    config: dict[str, Any] = {name: value for name, value in VALUES.items() if name in arguments}
    for name in ROPE_NAMES:
        if name in arguments and isinstance(arguments[name].default, tuple | list):
            config[name] = ROPE[len(arguments[name].default)]
    return config | OWN.get(kind.__name__, Own()).config


def _small_inputs(model: nn.Module) -> dict[str, Any]:
    own, wanted = OWN.get(type(model).__name__, Own()), inspect.signature(model.forward).parameters
    config = dict(model.config)
    in_tokens = "img_ids" in wanted or "img_shapes" in wanted
    layout = own.layout or (
        "tokens" if in_tokens else "video" if "3D" in type(model).__name__ else "image"
    )
    channels = next((config[name] for name in CHANNELS if config.get(name)), WIDTH)
    text = next((config[name] for name in TEXT_WIDTH if isinstance(config.get(name), int)), 24)
    axes = next((len(config[name]) for name in ROPE_NAMES if config.get(name)), 3)
    shapes = {
        "image": (channels, SIDE, SIDE),
        "video": (channels, FRAMES, SIDE, SIDE),
        "tokens": (SIDE * SIDE, channels),
    }
    made = {
        "hidden_states": rand(BATCH, *shapes[layout]),
        "timestep": torch.tensor([500.0, 100.0]),
        "encoder_hidden_states": rand(BATCH, TEXT, text),
        "encoder_attention_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
        "encoder_hidden_states_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
        "pooled_projections": rand(BATCH, config.get("pooled_projection_dim") or 24),
        "img_ids": torch.cartesian_prod(
            *[torch.zeros(1)] * (axes - 2), *[torch.arange(float(SIDE))] * 2
        ),
        "txt_ids": torch.zeros(TEXT, axes),
    }
    if config.get("guidance_embeds"):
        made["guidance"] = torch.tensor([3.5, 4.0])
    inputs = {name: value for name, value in made.items() if name in wanted} | own.inputs(model)
    return {name: value for name, value in inputs.items() if value is not None}


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
