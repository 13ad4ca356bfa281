"""Families of model classes: which layers of the known models stay, and which are weight-only."""

import math
from dataclasses import replace

import pytest
import torch
from small.pixart import PIXART, SANA
from torch import nn

from loraq.families import families, family_rules
from loraq.layers import linear_layers, matrix_shapes
from loraq.recipe import Recipe
from loraq.rules import Rule
from loraq.scheme import Scheme


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("diffusers")
    from loraq.integrations.diffusers import _quiet_diffusers

    with _quiet_diffusers() as module:
        for family in families().values():
            for name in family.classes:
                if name != "PreTrainedModel":  # of transformers
                    getattr(module, name)  # loaded on first use
        return module


def on_meta(kind: type, **config) -> nn.Module:
    with torch.device("meta"):
        return kind(**config)


def kept_and_quantized(model: nn.Module) -> tuple[dict[str, str], set[str]]:
    recipe, name = replace(Recipe.of("mxfp4"), keep="float"), type(model).__name__
    names = list(linear_layers(model))
    kept = {
        layer: recipe.rule_for(layer, name).reason
        for layer in names
        if not recipe.scheme_for(layer, (64, 64), name)
    }
    return kept, set(names) - set(kept)


def test_of_pixart_sigma_xl_the_same_224_layers_are_quantized_as_by_svdquant(diffusers):
    # The published configuration of PixArt-Sigma-XL-2-1024-MS.
    model = on_meta(
        diffusers.PixArtTransformer2DModel,
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        cross_attention_dim=1152,
        attention_bias=True,
        sample_size=128,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        interpolation_scale=2,
        use_additional_conditions=False,
        caption_channels=4096,
    )
    kept, quantized = kept_and_quantized(model)
    parts = [f"attn1.to_{part}" for part in ("q", "k", "v", "out.0")] + [
        "attn2.to_q",
        "attn2.to_out.0",
    ]
    parts += ["ff.net.0.proj", "ff.net.2"]
    assert len(quantized) == 224
    assert quantized == {f"transformer_blocks.{i}.{part}" for i in range(28) for part in parts}
    assert len(kept) == 62
    shapes = matrix_shapes(model)
    assert sum(math.prod(shapes[name]) for name in quantized) == 28 * (
        6 * 1152**2 + 2 * 1152 * 4608
    )


def test_the_layers_of_a_small_pixart_that_stay(diffusers):
    model = on_meta(
        diffusers.PixArtTransformer2DModel,
        **PIXART | {"num_layers": 1, "use_additional_conditions": True},
    )
    embedders = ("timestep_embedder", "resolution_embedder", "aspect_ratio_embedder")
    assert kept_and_quantized(model)[0] == {
        **{f"adaln_single.emb.{e}.linear_{i}": "embedding" for e in embedders for i in (1, 2)},
        "adaln_single.linear": "adaptive norm",
        "caption_projection.linear_1": "text projection",
        "caption_projection.linear_2": "text projection",
        "transformer_blocks.0.attn2.to_k": "text-side projection of the cross-attention",
        "transformer_blocks.0.attn2.to_v": "text-side projection of the cross-attention",
        "proj_out": "output projection",
    }


def test_the_layers_of_a_small_sana_that_stay(diffusers):
    model = on_meta(diffusers.SanaTransformer2DModel, **SANA)
    kept, quantized = kept_and_quantized(model)
    assert kept == {
        "time_embed.emb.timestep_embedder.linear_1": "embedding",
        "time_embed.emb.timestep_embedder.linear_2": "embedding",
        "time_embed.linear": "embedding",
        "patch_embed.proj": "input projection",
        "caption_projection.linear_1": "text projection",
        "caption_projection.linear_2": "text projection",
        **{
            f"transformer_blocks.{i}.attn2.to_{part}": "text-side projection of the cross-attention"
            for i in range(2)
            for part in "kv"
        },
        "proj_out": "output projection",
    }
    parts = [f"attn1.to_{part}" for part in ("q", "k", "v", "out.0")] + [
        "attn2.to_q",
        "attn2.to_out.0",
    ]
    parts += ["ff.conv_inverted", "ff.conv_point"]
    assert quantized == {f"transformer_blocks.{i}.{part}" for i in range(2) for part in parts}


def test_the_layers_of_a_small_flux_that_stay(diffusers):
    model = on_meta(
        diffusers.FluxTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=True,
    )
    kept, quantized = kept_and_quantized(model)
    embedders = ("timestep_embedder", "guidance_embedder", "text_embedder")
    assert kept == {
        **{f"time_text_embed.{e}.linear_{i}": "embedding" for e in embedders for i in (1, 2)},
        "context_embedder": "text projection",
        "x_embedder": "input projection",
        "norm_out.linear": "adaptive norm of the output",
        "proj_out": "output projection",
    }
    modulation = {f"transformer_blocks.0.norm1{part}.linear" for part in ("", "_context")}
    modulation |= {"single_transformer_blocks.0.norm.linear"}
    assert quantized == {
        *(f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
        *(
            f"transformer_blocks.0.attn.{part}"
            for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        ),
        *(
            f"transformer_blocks.0.{ff}.{part}"
            for ff in ("ff", "ff_context")
            for part in ("net.0.proj", "net.2")
        ),
        *(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.0.proj_mlp",
        "single_transformer_blocks.0.proj_out",
        *modulation,
    }
    recipe = Recipe.of("mxfp4+w8a8")
    schemes = {
        name: recipe.scheme_for(name, (64, 64), "FluxTransformer2DModel") for name in quantized
    }
    assert {name for name, scheme in schemes.items() if scheme.activation == "bf16"} == modulation
    assert {scheme.activation for name, scheme in schemes.items() if name not in modulation} == {
        "mxfp4"
    }


def test_every_rule_of_a_family_gives_a_reason_and_says_what_to_do(diffusers):
    *named, last = families().items()
    assert last[0] == "any"
    assert not last[1].classes
    for name, family in named:
        assert family.classes, name
        assert all(hasattr(diffusers, kind) or kind == "PreTrainedModel" for kind in family.classes)
    for _, family in families().items():
        assert all(
            rule.reason and (rule.weight_only or rule.keep or rule.skip is not None)
            for rule in family.rules
        )


def test_a_class_gets_the_rules_of_all_its_families_and_those_for_any_last():
    reasons = [rule.reason for rule in family_rules("HunyuanVideoTransformer3DModel")]
    text = reasons.index("blocks that refine the text")
    assert reasons.index("modulation") < text < reasons.index("embedding")
    assert family_rules("SomeTransformer") == families()["any"].rules


def test_weight_only_gives_no_branch_to_a_recipe_without_one():
    recipe = Recipe.of("mxfp4")
    assert recipe.scheme_for(
        "transformer_blocks.0.norm1.linear", (64, 64), "FluxTransformer2DModel"
    ) == Scheme("mxfp4")
    assert (
        recipe.scheme_for("transformer_blocks.0.attn.to_q", (64, 64), "FluxTransformer2DModel")
        == recipe.scheme
    )


def test_a_rule_of_the_recipe_comes_before_the_family_s():
    name, kind = "transformer_blocks.0.norm1.linear", "FluxTransformer2DModel"
    assert Recipe.of("mxfp4+w8a8").scheme_for(name, (64, 64), kind).activation == "bf16"
    rules = (Rule("*.norm1.linear", skip=False),)
    assert (
        replace(Recipe.of("mxfp4+w8a8"), rules=rules).scheme_for(name, (64, 64), kind).activation
        == "mxfp4"
    )
    assert (
        replace(Recipe.of("mxfp4+w8a8"), rules=(Rule("*norm*", skip=True),)).scheme_for(
            name, (64, 64), kind
        )
        is None
    )


def test_an_unknown_class_gets_the_rules_for_any():
    recipe = replace(Recipe.of("mxfp4"), keep="float")
    for name in ("proj_in", "time_embed.0", "blocks.0.norm.linear", "img_modulation.1"):
        assert recipe.scheme_for(name, (64, 64), "SomeTransformer") is None
    for name in ("blocks.0.attn.to_k", "blocks.0.proj_out", "layers.3.w1"):
        assert recipe.scheme_for(name, (64, 64), "SomeTransformer") is not None
