"""Pipelines of the paper's classes at small size: every component built here, nothing downloaded.

Weights are random and tokenizers are trained on a few sentences, so images are noise. Such a
pipeline shows that files, loaders and classes fit together; it says nothing about quality.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SENTENCES = (
    "a red fox in the snow, morning light",
    "a lighthouse on a cliff above a stormy sea",
    "portrait of an old sailor, oil on canvas",
    "a bowl of ripe cherries on a wooden table",
    "a small robot waters the flowers in a garden",
    "a city of glass towers at night, seen from the air",
    "two children fly a kite on a wide green meadow",
    "a steam train crosses an iron bridge in the mountains",
)


def t5_tokenizer() -> T5Tokenizer:
    """Return a T5 tokenizer trained on the sentences."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    # The scores stand in the serialized tokenizer only.
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[(piece, score) for piece, score in vocab], extra_ids=0)


def gemma_tokenizer() -> GemmaTokenizer:
    """Return a Gemma tokenizer trained on the sentences."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([sentence.replace(" ", "▁") for sentence in SENTENCES], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return GemmaTokenizer(vocab=model["vocab"], merges=merges)


def tiny_pixart_sigma(folder: Path) -> Path:
    """Write a small `PixArtSigmaPipeline` into a folder, and return the folder."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    text = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    )
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        cross_attention_dim=128,
        num_layers=2,
        sample_size=16,
        in_channels=4,
        out_channels=8,
        caption_channels=64,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    pipeline = diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text).eval(),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            sample_size=32,
        ).eval(),
        transformer=transformer.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    return _saved(pipeline, folder)


def tiny_sana(folder: Path) -> Path:
    """Write a small `SanaPipeline` into a folder, and return the folder."""
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    text = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
    )
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=32,
        cross_attention_dim=128,
        caption_channels=64,
        sample_size=16,
        patch_size=1,
    )
    pipeline = diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(text).eval(),
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(16, 32),
            decoder_block_out_channels=(16, 32),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
        ).eval(),
        transformer=transformer.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    )
    return _saved(pipeline, folder)


def _saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder
