"""Needs of the classes for images."""

from typing import Any

import torch
from small.needs import BATCH, HEAD_DIM, SIDE, TEXT, WIDTH, Own, rand

IMAGES: dict[str, Own] = {
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
    "BriaFiboTransformer2DModel": Own(
        inputs=lambda model: {"text_encoder_layers": [rand(BATCH, TEXT, 24)] * 2}
    ),
    "CogView3PlusTransformer2DModel": Own({"condition_dim": 16}, inputs=lambda model: sizes()),
    "CogView4Transformer2DModel": Own(
        {"condition_dim": 16, "rope_axes_dim": (8, 8)}, inputs=lambda model: sizes()
    ),
    "DiTTransformer2DModel": Own(
        {"norm_num_groups": 4}, inputs=lambda model: {"class_labels": torch.tensor([1, 7])}
    ),
    "DreamLiteTransformer2DModel": Own({"norm_num_groups": 4}),
    "ErnieImageTransformer2DModel": Own(
        inputs=lambda model: {
            "text_bth": rand(BATCH, TEXT, 24),
            "text_lens": torch.tensor([TEXT, TEXT - 2]),
        }
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
    "Krea2Transformer2DModel": Own(
        {"num_text_layers": 3},
        layout="tokens",
        inputs=lambda model: {
            "encoder_hidden_states": rand(BATCH, TEXT, 3, WIDTH),
            "position_ids": torch.arange(TEXT + SIDE * SIDE)[:, None].expand(-1, 3),
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
    "NucleusMoEImageTransformer2DModel": Own(
        {
            "num_layers": 5,
            "num_experts": 4,
            "mlp_ratio": 6.0,
            "moe_intermediate_dim": 16,
            "capacity_factors": 2.0,
        },
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
    "Transformer2DModel": Own(
        {"norm_num_groups": 4},
        inputs=lambda model: {"encoder_hidden_states": rand(BATCH, TEXT, WIDTH)},
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


def sizes() -> dict[str, Any]:
    """Return the sizes that condition CogView."""
    full, zero = torch.full((BATCH, 2), 32.0), torch.zeros(BATCH, 2)
    return {"original_size": full, "target_size": full, "crop_coords": zero}
