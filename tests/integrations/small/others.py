"""Needs of the classes for sound, molecules and embeddings, and of parts of other models."""

import torch
from small.needs import BATCH, HEAD_DIM, SIDE, TEXT, WIDTH, Own, rand

OTHERS: dict[str, Own] = {
    "AceStepTransformer1DModel": Own(
        {"audio_acoustic_hidden_dim": 4, "in_channels": 16},
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 8, 4),
            "context_latents": rand(BATCH, 8, 12),
            "timestep_r": torch.tensor([1.0, 0.5]),
            "encoder_hidden_states": rand(BATCH, TEXT, WIDTH),
        },
    ),
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
    "LongCatAudioDiTTransformer": Own(
        {"latent_dim": 8},
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 12, 8),
            "timestep": torch.tensor([0.5, 0.1]),
            "latent_cond": rand(BATCH, 12, 8),
        },
    ),
    "MiniMaxMusic3RVQDepthDecoder": Own(
        {"audio_vocab_size": 16}, inputs=lambda model: {"inputs_embeds": rand(BATCH, 8, WIDTH)}
    ),
    "MiniMaxMusic3Transformer1DModel": Own(
        {"rotary_dim": 8},
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 8, 12),
            "encoder_hidden_states": rand(BATCH, 12, 24),
        },
    ),
    "PriorTransformer": Own(
        {"embedding_dim": 24, "num_embeddings": TEXT},
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 24),
            "proj_embedding": rand(BATCH, 24),
            "encoder_hidden_states": rand(BATCH, TEXT, 24),
        },
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
    "StableAudio3DiTModel": Own(
        {"io_channels": 8, "local_add_cond_dim": 9, "num_memory_tokens": 4, "ff_mult": 2.0},
        inputs=lambda model: {
            "hidden_states": rand(BATCH, 8, 12),
            "global_hidden_states": rand(BATCH, 24),
        },
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
    "TransformerTemporalModel": Own(
        {"norm_num_groups": 4},
        inputs=lambda model: {"num_frames": BATCH, "encoder_hidden_states": None, "timestep": None},
    ),
}
