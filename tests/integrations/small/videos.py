"""Needs of the classes for videos."""

import inspect
from typing import Any

import torch
from small.needs import BATCH, FRAMES, HEAD_DIM, SIDE, TEXT, WIDTH, Own, rand
from torch import nn

VIDEOS: dict[str, Own] = {
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
    "CogVideoXTransformer3DModel": Own(
        {"max_text_seq_length": TEXT}, inputs=lambda model: frames_first()
    ),
    "ConsisIDTransformer3DModel": Own(
        {"max_text_seq_length": TEXT}, inputs=lambda model: frames_first()
    ),
    "CosmosTransformer3DModel": Own({"rope_scale": (1.0, 1.0, 1.0), "concat_padding_mask": False}),
    "EasyAnimateTransformer3DModel": Own({"patch_size": 2}),
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
    "JoyImageEditPlusTransformer3DModel": Own(
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 4, 8, 1, 2, 2),
            "shape_list": [[(1, 2, 2)]] * BATCH,
        }
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
        inputs=lambda model: {
            "hidden_states": rand(1, 1, 8, 8, 9),
            "timestep": torch.tensor([500.0]),
        },
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
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 8, 8),
            "num_frames": 2,
            "height": 2,
            "width": 2,
        },
    ),
    "LatteTransformer3DModel": Own(
        {
            "patch_size": 2,
            "video_length": FRAMES,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
        },
        inputs=lambda model: {"encoder_attention_mask": None},
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
}


def frames_first() -> dict[str, Any]:
    """Return a video as CogVideoX wants it: (batch, frames, channels, height, width)."""
    return {"hidden_states": rand(BATCH, FRAMES, 8, SIDE, SIDE)}


def wan_cache(model: nn.Module) -> Any:
    """Return an empty cache for keys and values, of the class that the model's own file defines."""
    home = inspect.getmodule(type(model))
    return home.WanAnimate2KVCache(model.config.num_layers)
