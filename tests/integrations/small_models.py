"""Every transformer class of diffusers, small: a configuration, and inputs for its forward.

Both follow general rules, by the name of an argument; `OWN` holds what a class needs besides.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TEXT, SIDE, FRAMES = 2, 8, 4, 2
HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM

#: Values of constructor arguments, wherever a class has an argument of this name.
VALUES: dict[str, Any] = {
    **dict.fromkeys(
        "num_layers num_single_layers num_mmdit_layers num_single_dit_layers n_layers n_refiner_layers "
        "num_refiner_layers num_hidden_layers mmdit_layers depth num_text_blocks num_visual_blocks nlayers "
        "dit_depth approximator_layers num_refiner_text_blocks num_layerwise_text_blocks perceiver_num_layers".split(),
        1,
    ),
    **dict.fromkeys(
        "num_attention_heads num_heads n_heads n_kv_heads num_key_value_heads num_kv_heads nheads dit_heads "
        "num_cross_attention_heads num_key_value_attention_heads text_num_attention_heads "
        "text_num_key_value_heads audio_num_attention_heads face_encoder_num_heads".split(),
        HEADS,
    ),
    **dict.fromkeys("attention_head_dim head_dim cross_attention_head_dim audio_attention_head_dim".split(), HEAD_DIM),
    **dict.fromkeys(
        "hidden_size dim inner_dim model_dim dit_dim embed_dim token_dim cross_attention_dim "
        "caption_projection_dim audio_cross_attention_dim text_hidden_dim".split(),
        WIDTH,
    ),
    **dict.fromkeys("intermediate_size ffn_dim ffn_hidden_size ff_dim text_intermediate_size ff_inner_dim".split(), 64),
    **dict.fromkeys(
        "joint_attention_dim text_embed_dim text_dim caption_channels cap_feat_dim context_in_dim text_in_dim "
        "pooled_projection_dim in_text_dim in_text_dim2 llm_features_dim condition_dim cond_token_dim "
        "global_cond_dim dit_text_dim text_emb_dim text_encoder_dim".split(),
        24,
    ),
    **dict.fromkeys(
        "time_embed_dim freq_dim time_dim timestep_embed_dim time_step_dim timestep_channels adaln_dim adaln_lora_dim "
        "timestep_guidance_channels timestep_features_dim time_proj_dim fourier_embedding_dim".split(),
        16,
    ),
    **dict.fromkeys("in_channels out_channels latent_channels in_visual_dim out_visual_dim".split(), 8),
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 32,
    "sample_size": SIDE,
    "sample_height": SIDE,
    "sample_width": SIDE,
    "sample_frames": FRAMES,
    "multiple_of": 16,
    "vocab_size": 40,
}
#: Axes of rotary embeddings; they share the dimension of a head.
ROPE = {2: (8, 8), 3: (4, 6, 6), 4: (4, 4, 4, 4)}
ROPE_ARGUMENTS = (
    "axes_dims_rope",
    "axes_dims",
    "rope_axes_dim",
    "axes_dim_rope",
    "rope_dim_list",
    "axes_dim",
    "rope_dim",
)


@dataclass(frozen=True)
class Own:
    """What one class needs besides the general rules."""

    #: Constructor arguments.
    config: dict[str, Any] = field(default_factory=dict)
    #: Layout of `hidden_states`: "image", "video" or "tokens"; `None` follows the name of the class.
    layout: str | None = None
    #: Arguments of forward, from the model; they replace or join those that the rules make. `None` leaves one out.
    inputs: Callable[[nn.Module], dict[str, Any]] = lambda model: {}


OWN: dict[str, Own] = {
    "AceStepTransformer1DModel": Own(
        {"audio_acoustic_hidden_dim": 4, "in_channels": 16},
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 8, 4),
            "context_latents": rand(BATCH, 8, 12),
            "timestep_r": torch.tensor([1.0, 0.5]),
            "encoder_hidden_states": rand(BATCH, TEXT, WIDTH),
        },
    ),
    "AnyFlowFARTransformer3DModel": Own(
        {"full_chunk_limit": 2, "chunk_partition": (1, 1)},
        inputs=lambda model: {
            "hidden_states": rand(1, 2, 8, 8, 8),
            "encoder_hidden_states": rand(1, TEXT, 24),
            "timestep": torch.full((1, 2), 500.0),
            "r_timestep": torch.full((1, 2), 300.0),
            "chunk_partition": [1, 1],
        },
    ),
    "AnyFlowTransformer3DModel": Own(
        inputs=lambda model: {
            "hidden_states": rand(BATCH, FRAMES, 8, SIDE, SIDE),
            "timestep": torch.full((BATCH, FRAMES), 500.0),
            "r_timestep": torch.full((BATCH, FRAMES), 300.0),
        }
    ),
    "BriaFibo2Transformer2DModel": Own(
        {
            "max_num_gist_tokens": 8,
            "min_num_gist_tokens": 4,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 8,
            "injection_layer_ids": (0,),
        },
        inputs=lambda model: {"encoder_hidden_states": rand(BATCH, 2, TEXT, 24)},
    ),
    "BriaFiboTransformer2DModel": Own(inputs=lambda model: {"text_encoder_layers": [rand(BATCH, TEXT, 24)] * 2}),
    "CogVideoXTransformer3DModel": Own({"max_text_seq_length": TEXT}, inputs=lambda model: frames_first()),
    "ConsisIDTransformer3DModel": Own({"max_text_seq_length": TEXT}, inputs=lambda model: frames_first()),
    "CogView3PlusTransformer2DModel": Own({"condition_dim": 16}, inputs=lambda model: sizes()),
    "CogView4Transformer2DModel": Own({"condition_dim": 16, "rope_axes_dim": (8, 8)}, inputs=lambda model: sizes()),
    "CosmosTransformer3DModel": Own({"rope_scale": (1.0, 1.0, 1.0), "concat_padding_mask": False}),
    "Cosmos3OmniTransformer": Own(
        {"rope_axes_dim": (4, 2, 2), "latent_channel": 4, "patch_latent_dim": 16},
        inputs=lambda model: {
            "input_ids": torch.arange(TEXT),
            "text_indexes": torch.arange(TEXT),
            "position_ids": torch.arange(TEXT + 4).expand(3, -1),
            "und_len": TEXT,
            "sequence_length": TEXT + 4,
            "vision_tokens": [rand(1, 4, 1, SIDE, SIDE)],
            "vision_token_shapes": [(1, 2, 2)],
            "vision_sequence_indexes": torch.arange(TEXT, TEXT + 4),
            "vision_mse_loss_indexes": torch.arange(TEXT, TEXT + 4),
            "vision_timesteps": torch.full((4,), 500.0),
            "vision_noisy_frame_indexes": [torch.tensor([0])],
        },
    ),
    "DiTTransformer2DModel": Own({"norm_num_groups": 4}, inputs=lambda model: {"class_labels": torch.tensor([1, 7])}),
    "DreamLiteTransformer2DModel": Own({"norm_num_groups": 4}),
    "EasyAnimateTransformer3DModel": Own({"patch_size": 2}),
    "ErnieImageTransformer2DModel": Own(
        inputs=lambda model: {"text_bth": rand(BATCH, TEXT, 24), "text_lens": torch.tensor([TEXT, TEXT - 2])}
    ),
    "GlmImageTransformer2DModel": Own(
        {"condition_dim": 16, "prior_vq_quantizer_codebook_size": 16},
        inputs=lambda model: (
            sizes()
            | {
                "original_size": None,
                "prior_token_id": torch.arange(4).expand(BATCH, 4),
                "prior_token_drop": torch.zeros(BATCH, 4, dtype=torch.bool),
            }
        ),
    ),
    "HiDreamImageTransformer2DModel": Own(
        {
            "patch_size": 2,
            "caption_channels": [24, 24],
            "llama_layers": [0, 1],
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (SIDE, SIDE),
            "force_inference_output": True,
        },
        layout="image",
        inputs=lambda model: {
            "timesteps": torch.tensor([500.0, 100.0]),
            "img_ids": None,
            "encoder_hidden_states_t5": rand(BATCH, TEXT, 24),
            "encoder_hidden_states_llama3": rand(2, BATCH, TEXT, 24),
            "pooled_embeds": rand(BATCH, 24),
        },
    ),
    "HunyuanDiT2DModel": Own(
        {
            "patch_size": 2,
            "num_layers": 2,
            "cross_attention_dim_t5": 24,
            "text_len": TEXT,
            "text_len_t5": TEXT,
            "pooled_projection_dim": 16,
        },
        inputs=lambda model: {
            "encoder_hidden_states": rand(BATCH, TEXT, WIDTH),
            "encoder_hidden_states_t5": rand(BATCH, TEXT, 24),
            "text_embedding_mask": torch.ones(BATCH, TEXT),
            "text_embedding_mask_t5": torch.ones(BATCH, TEXT),
            "image_meta_size": torch.full((BATCH, 6), 32),
            "style": torch.tensor([0, 0]),
            "image_rotary_emb": (rand(4, HEAD_DIM), rand(4, HEAD_DIM)),
        },
    ),
    "HunyuanVideo15Transformer3DModel": Own(
        {"text_embed_2_dim": 24, "image_embed_dim": 24},
        inputs=lambda model: {
            "encoder_hidden_states_2": rand(BATCH, TEXT, 24),
            "encoder_attention_mask_2": torch.ones(BATCH, TEXT, dtype=torch.bool),
            "image_embeds": rand(BATCH, 3, 24),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": Own(
        {"has_image_proj": True, "image_proj_dim": 24, "has_clean_x_embedder": True},
        inputs=lambda model: {
            "image_embeds": rand(BATCH, 3, 24),
            "indices_latents": torch.arange(FRAMES),
            "latents_clean": rand(BATCH, 8, 1, SIDE, SIDE),
            "indices_latents_clean": torch.arange(1),
            "latents_history_2x": rand(BATCH, 8, 2, SIDE, SIDE),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": rand(BATCH, 8, 4, 2 * SIDE, 2 * SIDE),
            "indices_latents_history_4x": torch.arange(4),
        },
    ),
    "Ideogram4Transformer2DModel": Own(
        {"mrope_section": (4, 2, 2)},
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 12, 8),
            "timestep": torch.tensor([0.5, 0.1]),
            "encoder_hidden_states": rand(BATCH, 12, 24),
            "position_ids": torch.arange(12)[None, :, None].expand(BATCH, 12, 3),
            "segment_ids": torch.zeros(BATCH, 12, dtype=torch.long),
            "indicator": torch.tensor([3] * 4 + [2] * 8).expand(BATCH, 12),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": Own(
        inputs=lambda model: {"hidden_states": rand(BATCH, 4, 8, 1, 2, 2), "shape_list": [[(1, 2, 2)]] * BATCH}
    ),
    "Kandinsky5Transformer3DModel": Own(
        inputs=lambda model: {
            "hidden_states": rand(1, FRAMES, SIDE, SIDE, 8),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": rand(1, TEXT, 24),
            "pooled_projections": rand(1, 24),
            "visual_rope_pos": tuple(torch.arange(n) for n in (FRAMES, 2, 2)),
            "text_rope_pos": torch.arange(TEXT),
        }
    ),
    "Kandinsky6SRTransformer3DModel": Own(
        {"in_visual_dim": 4},
        inputs=lambda model: {"hidden_states": rand(1, 1, 8, 8, 9), "timestep": torch.tensor([500.0])},
    ),
    "Kandinsky6Transformer3DModel": Own(
        {"in_audio_dim": 4, "out_audio_dim": 4},
        inputs=lambda model: {
            "hidden_states": rand(1, FRAMES, SIDE, SIDE, 17),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": rand(1, TEXT, 24),
            "encoder_attention_mask": None,
            "pooled_projections": rand(1, 24),
            "audio_hidden_states": rand(1, 3, 4),
        },
    ),
    "Krea2Transformer2DModel": Own(
        {"num_text_layers": 3},
        layout="tokens",
        inputs=lambda model: {
            "encoder_hidden_states": rand(BATCH, TEXT, 3, WIDTH),
            "position_ids": torch.arange(TEXT + SIDE * SIDE)[:, None].expand(-1, 3),
        },
    ),
    "LTX2VideoTransformer3DModel": Own(
        {"audio_in_channels": 8, "audio_out_channels": 8},
        layout="tokens",
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 8, 8),
            "audio_hidden_states": rand(BATCH, 5, 8),
            "audio_encoder_hidden_states": rand(BATCH, TEXT, 24),
            "num_frames": 2,
            "height": 2,
            "width": 2,
            "audio_num_frames": 5,
        },
    ),
    "LTXVideoTransformer3DModel": Own(
        layout="tokens",
        inputs=lambda model: {"hidden_states": rand(BATCH, 8, 8), "num_frames": 2, "height": 2, "width": 2},
    ),
    "LatteTransformer3DModel": Own(
        {"patch_size": 2, "video_length": FRAMES, "norm_type": "ada_norm_single", "norm_elementwise_affine": False},
        inputs=lambda model: {"encoder_attention_mask": None},
    ),
    "LongCatAudioDiTTransformer": Own(
        {"latent_dim": 8},
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 12, 8),
            "timestep": torch.tensor([0.5, 0.1]),
            "latent_cond": rand(BATCH, 12, 8),
        },
    ),
    "Lumina2Transformer2DModel": Own({"axes_lens": (32, 16, 16)}),
    "LuminaNextDiT2DModel": Own(
        inputs=lambda model: {
            "cross_attention_kwargs": {},
            "encoder_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
            "image_rotary_emb": torch.polar(torch.ones(8, 8, 8), rand(8, 8, 8)),
        }
    ),
    "MiniMaxH3Transformer3DModel": Own(
        {"audio_in_channels": 8, "time_embed_hidden_dim": 24, "rope_freq_dim": 2},
        inputs=lambda model: {
            "hidden_states": rand(1, 4, 32),
            "audio_hidden_states": rand(1, 3, 8),
            "encoder_hidden_states": rand(1, 5, 24),
            "timestep": torch.tensor([0.2, 0.7]),
            "timestep_indices": torch.arange(12) % 2,
            "token_tags": torch.tensor([1] * 5 + [0] * 4 + [2] * 3),
            "position_ids": torch.arange(12)[:, None].expand(12, 3),
            "video_indices": torch.arange(5, 9),
            "audio_indices": torch.arange(9, 12),
            "text_indices": torch.arange(5),
        },
    ),
    "MiniMaxMusic3RVQDepthDecoder": Own(
        {"audio_vocab_size": 16}, inputs=lambda model: {"inputs_embeds": rand(BATCH, 8, WIDTH)}
    ),
    "MiniMaxMusic3Transformer1DModel": Own(
        {"rotary_dim": 8},
        inputs=lambda model: {"hidden_states": rand(BATCH, 8, 12), "encoder_hidden_states": rand(BATCH, 12, 24)},
    ),
    "NucleusMoEImageTransformer2DModel": Own(
        {"num_layers": 5, "num_experts": 4, "mlp_ratio": 6.0, "moe_intermediate_dim": 16, "capacity_factors": 2.0},
        inputs=lambda model: {"img_shapes": [(1, SIDE, SIDE)]},
    ),
    "OmniGenTransformer2DModel": Own(
        {
            "pad_token_id": 0,
            "pos_embed_max_size": SIDE,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        inputs=lambda model: {
            "timestep": torch.tensor([0.5, 0.1]),
            "input_ids": torch.arange(6).expand(BATCH, 6),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(BATCH, 11, 11),
            "position_ids": torch.arange(11).expand(BATCH, 11),
        },
    ),
    "PRXTransformer2DModel": Own({"axes_dim": [8, 8]}),
    "PriorTransformer": Own(
        {"embedding_dim": 24, "num_embeddings": TEXT},
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 24),
            "proj_embedding": rand(BATCH, 24),
            "encoder_hidden_states": rand(BATCH, TEXT, 24),
        },
    ),
    "QwenImage21Transformer2DModel": Own(
        inputs=lambda model: {
            "img_shapes": [[(1, SIDE, SIDE)]] * BATCH,
            "img_mask": torch.tensor([False] * TEXT + [True] * 4).expand(BATCH, -1),
        }
    ),
    "QwenImageTransformer2DModel": Own(
        {"patch_size": 2, "in_channels": 8, "out_channels": 2},
        inputs=lambda model: {"img_shapes": [(1, SIDE, SIDE)] * BATCH},
    ),
    "RFD4ProteinaTransformer": Own(
        {
            "dim_cond": 16,
            "pair_repr_dim": 16,
            "latent_dim": 4,
            "tri_mult_c": 16,
            "nlayers": 2,
            "t_emb_dim": 16,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        },
        inputs=lambda model: {
            "bb_ca": rand(BATCH, 6, 3),
            "local_latents": rand(BATCH, 6, 4),
            "bb_ca_time": torch.tensor([0.5, 0.1]),
            "local_latents_time": torch.tensor([0.5, 0.1]),
            "padding_mask": torch.ones(BATCH, 6, dtype=torch.bool),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(BATCH, 6, dtype=torch.bool),
                "supports_local_latent": torch.ones(BATCH, 6, dtype=torch.bool),
            },
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Own(
        layout="tokens",
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 8, 8),
            "video_rotary_emb": (rand(1, 8, WIDTH), rand(1, 8, WIDTH)),
        },
    ),
    "SanaWMTransformer3DModel": Own(
        {"linear_head_dim": HEAD_DIM, "chunk_plucker_post_attn_blocks": 1},
        inputs=lambda model: {
            "encoder_hidden_states": rand(BATCH, 1, TEXT, 24),
            "timestep": torch.full((BATCH, 1, FRAMES), 500.0),
        },
    ),
    "StableAudio3DiTModel": Own(
        {"io_channels": 8, "local_add_cond_dim": 9, "num_memory_tokens": 4, "ff_mult": 2.0},
        inputs=lambda model: {"hidden_states": rand(BATCH, 8, 12), "global_hidden_states": rand(BATCH, 24)},
    ),
    "StableAudioDiTModel": Own(
        {"cross_attention_input_dim": 24, "global_states_input_dim": 24},
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 8, 12),
            "encoder_hidden_states": rand(BATCH, TEXT, 24),
            "global_hidden_states": rand(BATCH, 1, 24),
            "rotary_embedding": (rand(13, 8), rand(13, 8)),
        },
    ),
    "T5FilmDecoder": Own(
        {"input_dims": 8, "targets_length": 12, "d_model": WIDTH, "d_kv": HEAD_DIM, "d_ff": 64},
        inputs=lambda model: {
            "encodings_and_masks": [(rand(BATCH, TEXT, WIDTH), torch.ones(BATCH, TEXT))],
            "decoder_input_tokens": rand(BATCH, 12, 8),
            "decoder_noise_time": torch.tensor([0.5, 0.1]),
        },
    ),
    "Transformer2DModel": Own(
        {"norm_num_groups": 4}, inputs=lambda model: {"encoder_hidden_states": rand(BATCH, TEXT, WIDTH)}
    ),
    "TransformerTemporalModel": Own(
        {"norm_num_groups": 4},
        inputs=lambda model: {"num_frames": BATCH, "encoder_hidden_states": None, "timestep": None},
    ),
    "WanAnimate2Transformer3DModel": Own(
        {"in_dim": 16, "out_dim": 8, "text_len": TEXT, "use_img_emb": False},
        inputs=lambda model: {
            "hidden_states": list(rand(1, 8, FRAMES, SIDE, SIDE)),
            "condition_latents": list(rand(1, 8, FRAMES, SIDE, SIDE)),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": list(rand(1, TEXT, 24)),
            "kv_cache": wan_cache(model),
            "kv_cache_mode": "extract",
            "seq_len": 8,
            "offset_grid_sizes": torch.tensor([[FRAMES, 2, 2]]),
        },
    ),
    "WanAnimateTransformer3DModel": Own(
        {
            "in_channels": 20,
            "latent_channels": 8,
            "image_dim": None,
            "motion_encoder_channel_sizes": dict.fromkeys(("4", "8", "16"), 8),
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 16,
            "inject_face_latents_blocks": 1,
        },
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 20, 3, SIDE, SIDE),
            "pose_hidden_states": rand(BATCH, 8, 2, SIDE, SIDE),
            "face_pixel_values": rand(BATCH, 3, 5, 16, 16),
        },
    ),
    "WanVACETransformer3DModel": Own(
        {"vace_layers": [0], "vace_in_channels": 8},
        inputs=lambda model: {"control_hidden_states": rand(BATCH, 8, FRAMES, SIDE, SIDE)},
    ),
    "ZImageTransformer2DModel": Own(
        {"axes_lens": (64, 16, 16)},
        inputs=lambda model: {
            "x": list(rand(BATCH, 8, 1, SIDE, SIDE)),
            "t": torch.tensor([0.5, 0.1]),
            "cap_feats": list(rand(BATCH, TEXT, 24)),
        },
    ),
}


def wan_cache(model: nn.Module) -> Any:
    """Return an empty cache for keys and values, of the class that the model's own file defines."""
    home = inspect.getmodule(type(model))
    return home.WanAnimate2KVCache(model.config.num_layers)


def frames_first() -> dict[str, Any]:
    """Return a video as CogVideoX wants it: (batch, frames, channels, height, width)."""
    return {"hidden_states": rand(BATCH, FRAMES, 8, SIDE, SIDE)}


def sizes() -> dict[str, Any]:
    """Return the sizes that condition CogView."""
    full, zero = torch.full((BATCH, 2), 32.0), torch.zeros(BATCH, 2)
    return {"original_size": full, "target_size": full, "crop_coords": zero}


def small_config(kind: type[nn.Module]) -> dict[str, Any]:
    """Return constructor arguments that make a class small."""
    arguments = inspect.signature(kind.__init__).parameters
    config = {name: value for name, value in VALUES.items() if name in arguments}
    for name in ROPE_ARGUMENTS:
        if name in arguments and isinstance(arguments[name].default, tuple | list):
            config[name] = ROPE[len(arguments[name].default)]
    return config | OWN.get(kind.__name__, Own()).config


def small_model(kind: type[nn.Module]) -> nn.Module:
    """Return a small model of a class with seeded random weights."""
    torch.manual_seed(0)
    model = kind(**small_config(kind)).eval()
    for parameter in model.parameters():  # nothing may be zero: a zero gate would hide what is behind it
        if parameter.is_floating_point():
            nn.init.normal_(parameter.data, std=0.2)
    return model


def rand(*shape: int) -> Tensor:
    """Return numbers that are the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def small_inputs(model: nn.Module) -> dict[str, Any]:
    """Return arguments for the forward of a small model."""
    own, wanted = OWN.get(type(model).__name__, Own()), inspect.signature(model.forward).parameters
    config: dict[str, Any] = dict(model.config)  # type: ignore[arg-type]
    ids = "img_ids" in wanted or "img_shapes" in wanted
    layout = own.layout or ("tokens" if ids else "video" if "3D" in type(model).__name__ else "image")
    channels = (
        next(
            config[n]
            for n in (
                "in_channels",
                "in_visual_dim",
                "in_dim",
                "io_channels",
                "latent_dim",
                "embedding_dim",
                "inner_dim",
            )
            if config.get(n)
        )
        if "hidden_states" in wanted
        else 0
    )
    shape = {
        "image": (channels, SIDE, SIDE),
        "video": (channels, FRAMES, SIDE, SIDE),
        "tokens": (SIDE * SIDE, channels),
    }
    text = (
        "joint_attention_dim",
        "caption_channels",
        "text_embed_dim",
        "text_dim",
        "cap_feat_dim",
        "text_in_dim",
        "context_in_dim",
        "in_text_dim",
        "text_hidden_dim",
        "cross_attention_dim",
        "llm_features_dim",
        "cond_token_dim",
    )
    text_dim = next((config[n] for n in text if isinstance(config.get(n), int)), 24)
    axes = next((len(config[n]) for n in ROPE_ARGUMENTS if config.get(n)), 3)
    made = {
        "hidden_states": rand(BATCH, *shape[layout]),
        "timestep": torch.tensor([500.0, 100.0]),
        "encoder_hidden_states": rand(BATCH, TEXT, text_dim),
        "encoder_attention_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
        "encoder_hidden_states_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
        "pooled_projections": rand(BATCH, config.get("pooled_projection_dim") or 24),
        "img_ids": torch.cartesian_prod(*([torch.zeros(1)] * (axes - 2)), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(TEXT, axes),
    }
    if config.get("guidance_embeds"):
        made["guidance"] = torch.tensor([3.5, 4.0])
    inputs = {name: value for name, value in made.items() if name in wanted} | own.inputs(model)
    return {name: value for name, value in inputs.items() if value is not None}


def run(model: nn.Module) -> list[Tensor]:
    """Return all tensors that a small model makes of its small inputs."""
    tuple_please = {"return_dict": False} if "return_dict" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        return list(_tensors(model(**small_inputs(model), **tuple_please)))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
