"""Every class of transformers that a pipeline of diffusers names, small: settings and inputs."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.encoders import config_of

#: Of every decoder in the style of Llama.
DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: Of every encoder in the style of BERT, CLIP and ViT.
ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CLIP_TEXT = ENCODER | {
    "vocab_size": 64,
    "projection_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 32,
}
CLIP_VISION = ENCODER | {"image_size": 32, "patch_size": 16, "projection_dim": 32}
BERT = ENCODER | {"vocab_size": 64, "max_position_embeddings": 32}
T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN_TEXT = DECODER | ROPE
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 64,
    "embed_dim": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "out_hidden_size": 64,
}
GEMMA_TEXT = DECODER | {"sliding_window": 8, "query_pre_attn_scalar": 16}
SIGLIP = ENCODER | {"image_size": 32, "patch_size": 16}
PIXTRAL = ENCODER | {"image_size": 32, "patch_size": 16, "head_dim": 16, "model_type": "pixtral"}

SETTINGS: dict[str, dict[str, Any]] = {
    "BertModel": BERT,
    "BlipForConditionalGeneration": {
        "text_config": BERT | {"encoder_hidden_size": 64, "bos_token_id": 1, "sep_token_id": 2},
        "vision_config": SIGLIP,
        "projection_dim": 32,
        "image_text_hidden_size": 32,
    },
    "CLIPTextModel": CLIP_TEXT,
    "CLIPTextModelWithProjection": CLIP_TEXT,
    "CLIPVisionModel": CLIP_VISION,
    "CLIPVisionModelWithProjection": CLIP_VISION,
    "ClapModel": {
        "text_config": BERT | {"projection_dim": 32},
        "audio_config": {
            "spec_size": 64,
            "hidden_size": 64,
            "patch_embeds_hidden_size": 32,
            "depths": [1, 1],
            "num_attention_heads": [2, 4],
            "num_hidden_layers": 2,
            "num_mel_bins": 16,
            "window_size": 4,
            "projection_dim": 32,
        },
        "projection_dim": 32,
    },
    "ClapTextModelWithProjection": BERT | {"projection_dim": 32},
    "DPTForDepthEstimation": SIGLIP
    | {
        "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [16, 16, 16, 16],
        "fusion_hidden_size": 16,
    },
    "Gemma2Model": GEMMA_TEXT,
    "Gemma3ForConditionalGeneration": {
        "text_config": GEMMA_TEXT,
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    },
    "Gemma4ForConditionalGeneration": {
        "text_config": GEMMA_TEXT
        | {
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 64,
            "num_kv_shared_layers": 0,
        },
        "vision_config": None,
        "audio_config": None,
        "image_token_id": 60,
        "audio_token_id": 61,
        "video_token_id": 62,
        "boi_token_id": 59,
        "eoi_token_id": 58,
    },
    "Gemma4UnifiedForConditionalGeneration": {
        "text_config": GEMMA_TEXT | {"global_head_dim": 16},
        "vision_config": None,
        "audio_config": None,
        "image_token_id": 60,
        "audio_token_id": 61,
        "video_token_id": 62,
    },
    "GemmaModel": DECODER,
    "GlmImageForConditionalGeneration": {
        "text_config": QWEN_TEXT | {"vision_vocab_size": 64},
        "vision_config": QWEN_VISION | {"image_size": 32, "patch_size": 16},
        "vq_config": {"embed_dim": 32, "num_embeddings": 32, "latent_channels": 64},
        "image_token_id": 60,
        "image_start_token_id": 61,
        "image_end_token_id": 62,
    },
    "GlmModel": DECODER,
    "LlamaForCausalLM": DECODER,
    "LlamaModel": DECODER,
    "LlavaForConditionalGeneration": {
        "text_config": DECODER | {"model_type": "llama"},
        "vision_config": CLIP_VISION | {"model_type": "clip_vision_model"},
        "image_token_index": 60,
    },
    "Ministral3ForCausalLM": DECODER,
    "Mistral3ForConditionalGeneration": {
        "text_config": DECODER | {"model_type": "mistral"},
        "vision_config": PIXTRAL,
        "image_token_index": 60,
    },
    "Mistral3Model": {
        "text_config": DECODER | {"model_type": "mistral"},
        "vision_config": PIXTRAL,
        "image_token_index": 60,
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": QWEN_TEXT,
        "vision_config": QWEN_VISION | {"hidden_size": 64},
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": QWEN_TEXT,
        "vision_config": QWEN_VISION,
    },
    "Qwen2_5_VLTextModel": QWEN_TEXT,
    "Qwen3ForCausalLM": DECODER | {"tie_word_embeddings": True},
    "Qwen3Model": DECODER,
    "Qwen3VLForConditionalGeneration": {
        "text_config": QWEN_TEXT,
        "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]},
    },
    "Qwen3VLModel": {
        "text_config": QWEN_TEXT,
        "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]},
    },
    "Siglip2VisionModel": ENCODER | {"patch_size": 16, "num_patches": 4},
    "SiglipModel": {
        "text_config": CLIP_TEXT | {"projection_size": 64, "pad_token_id": 0},
        "vision_config": SIGLIP,
    },
    "SiglipVisionModel": SIGLIP,
    "SmolLM3ForCausalLM": DECODER,
    "T5EncoderModel": T5,
    "T5Gemma2Encoder": {
        "encoder": {"text_config": GEMMA_TEXT, "vision_config": SIGLIP},
        "decoder": GEMMA_TEXT,
    },
    "T5GemmaEncoder": {"encoder": GEMMA_TEXT, "decoder": GEMMA_TEXT},
    "T5GemmaEncoderModel": {"encoder": GEMMA_TEXT, "decoder": GEMMA_TEXT},
    "UMT5EncoderModel": T5,
    "VitsModel": {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 96,
        "flow_size": 64,
        "spectrogram_bins": 33,
        "upsample_initial_channel": 32,
        "depth_separable_num_layers": 1,
        "duration_predictor_num_flows": 2,
        "posterior_encoder_num_wavenet_layers": 1,
        "prior_encoder_num_flows": 1,
        "prior_encoder_num_wavenet_layers": 1,
        "use_stochastic_duration_prediction": False,
    },
}


def small_encoder(kind: Any) -> nn.Module:
    """Return a small model of a class with seeded random weights."""
    torch.manual_seed(0)
    return kind(config_of(kind, SETTINGS[kind.__name__])).eval()


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model takes: images for one that sees, tokens for all others."""
    name, rng = type(model).__name__, torch.Generator().manual_seed(0)
    dtype = model.dtype
    ids = torch.randint(3, 50, (2, 9), generator=rng)
    image = torch.randn(1, 3, 32, 32, generator=rng).to(dtype)
    if name in ("CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipVisionModel"):
        return {"pixel_values": image}
    if name == "DPTForDepthEstimation":
        return {"pixel_values": image}
    if name == "Siglip2VisionModel":
        return {
            "pixel_values": torch.randn(1, 4, 768, generator=rng).to(dtype),
            "pixel_attention_mask": torch.ones(1, 4, dtype=torch.long),
            "spatial_shapes": torch.tensor([[2, 2]]),
        }
    if name in ("BlipForConditionalGeneration", "SiglipModel"):
        return {"input_ids": ids[:1], "pixel_values": image}
    if name == "ClapModel":
        features = torch.randn(2, 1, 64, 16, generator=rng).to(dtype)
        return {"input_ids": ids, "input_features": features, "is_longer": torch.zeros(2, 1)}
    return {"input_ids": ids}


def run(model: nn.Module) -> list[Tensor]:
    """Return all tensors that a model puts out."""
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = model(**inputs_of(model))
    return [value for value in outputs.to_tuple() if isinstance(value, Tensor)]
