"""Plans: every layer's scheme, bytes and reason, before any work."""

import math

import pytest
import torch
from torch import nn

from loraq.errors import RecipeError, SchemeError
from loraq.methods import layer_seed
from loraq.pipeline.jobs import KeptLayer, LayerJob, OtherWeight
from loraq.pipeline.module import plan_model
from loraq.pipeline.plan import Plan
from loraq.recipe import Recipe
from loraq.rules import Rule
from loraq.scheme import Branch, Scheme

SHAPES = {
    "patch_embed.proj": (64, 16),
    "blocks.0.attn.to_q": (64, 64),
    "blocks.0.attn.to_k": (64, 64),
    "blocks.0.ff.up": (256, 64),
    "head": (10, 64),
}
RECIPE = Recipe(
    Scheme("mxfp4", "mxfp4", Branch(8, "mxint8", "mxint8")),
    keep="float",
    rules=(Rule("head", skip=True),),
)


def test_a_plan_has_every_layer_in_the_order_given():
    plan = Plan.of(SHAPES, RECIPE)
    assert {layer.name: layer.shape for layer in plan.layers} == SHAPES
    assert [layer.name for layer in plan.layers] == list(SHAPES)
    assert [layer.name for layer in plan.quantized] == [
        "blocks.0.attn.to_q",
        "blocks.0.attn.to_k",
        "blocks.0.ff.up",
    ]
    assert all(layer.scheme == RECIPE.scheme for layer in plan.quantized)


def test_a_layer_that_stays_has_a_reason_and_the_others_have_none():
    plan = Plan.of(SHAPES, RECIPE)
    reasons = {layer.name: layer.reason for layer in plan.layers if isinstance(layer, KeptLayer)}
    assert reasons == {"patch_embed.proj": "input projection", "head": "rule 'head'"}
    assert all(layer.reason == "" for layer in plan.quantized)


@pytest.mark.parametrize(
    ("scheme", "shape", "nbytes"),
    [
        (Scheme("mxfp4"), (64, 64), 64 * 32 + 64 * 2),
        (Scheme("mxfp4"), (3, 40), 3 * 20 + 3 * 2),
        (Scheme("nvfp4"), (64, 64), 64 * 32 + 64 * 4 + 4),
        (Scheme("int4", branch=Branch(8)), (64, 128), 64 * 64 + 64 * 2 * 2 + 2 * 8 * (64 + 128)),
        (
            Scheme("mxfp4", branch=Branch(8, "mxint8")),
            (64, 64),
            64 * 34 + 64 * (8 + 1) + 8 * (64 + 2),
        ),
    ],
)
def test_the_bytes_of_a_layer(scheme, shape, nbytes):
    job = LayerJob.of("a", shape, scheme, RECIPE)
    assert job.nbytes == nbytes
    assert job.bits_per_weight == 8 * nbytes / math.prod(shape)


def test_a_kept_layer_is_counted_at_16_bits():
    assert KeptLayer("a", (64, 10), "why").nbytes == 2 * 64 * 10


def test_a_job_has_all_that_a_driver_needs_but_the_weight():
    for job in Plan.of(SHAPES, RECIPE).quantized:
        assert job.method == RECIPE.solver(job.scheme)
        assert job.seed == layer_seed(RECIPE.seed, job.name)


def test_the_totals_of_a_plan():
    plan = Plan.of(SHAPES, RECIPE)
    assert plan.nbytes == sum(layer.nbytes for layer in plan.layers)
    assert plan.nbytes_bf16 == 2 * (64 * 16 + 2 * 64 * 64 + 256 * 64 + 640)
    quantized = 64 * 64 + 64 * 64 + 256 * 64
    assert plan.bits_per_weight == 8 * sum(layer.nbytes for layer in plan.quantized) / quantized
    assert plan.nbytes < plan.nbytes_bf16


def test_a_plan_of_nothing():
    plan = Plan.of({}, RECIPE)
    assert plan.layers == plan.quantized == ()
    assert plan.nbytes == plan.nbytes_bf16 == 0
    assert plan.bits_per_weight == 0.0


def test_a_rank_left_open_is_settled_for_each_layer():
    plan = Plan.of(SHAPES, Recipe.from_dict({"scheme": "mxfp4+w8a8", "budget": "r16=4"}))
    for layer in plan.quantized:
        if layer.is_kept:
            continue
        assert 0 < layer.scheme.branch.rank <= 7
        assert layer.nbytes <= Scheme("mxfp4").nbytes(layer.shape) + 8 * sum(layer.shape)


def test_the_class_of_the_model_selects_its_rules():
    shapes = {"transformer_blocks.0.attn2.to_k": (64, 64)}
    assert Plan.of(shapes, RECIPE).quantized
    plan = Plan.of(shapes, RECIPE, "PixArtTransformer2DModel")
    assert plan.layers[0].reason == "text-side projection of the cross-attention"


class FluxTransformer2DModel(nn.Module):
    """Named as a class of the families, with a layer that they skip, and one that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_out = nn.Linear(64, 64)
        self.norm_out = nn.Linear(64, 64)
        self.to_q = nn.Linear(64, 64)


class Finetuned(FluxTransformer2DModel):
    """A subclass is what it is derived from."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's own compiler
@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda model: model, "to_q"),
        (torch.compile, "to_q"),
        (nn.DataParallel, "to_q"),
        (lambda model: nn.ModuleDict({"net": nn.Sequential(model)}), "net.0.to_q"),
        (lambda model: nn.ModuleDict({"net": torch.nn.ModuleList([model])}), "net.0.to_q"),
    ],
)
@pytest.mark.parametrize("kind", [FluxTransformer2DModel, Finetuned])
def test_the_rules_of_a_class_hold_wherever_its_model_is(kind, wrap, name):
    plan = plan_model(wrap(kind()), RECIPE)
    assert [layer.name for layer in plan.quantized] == [name]
    assert [layer.reason for layer in plan.kept] == [
        "output projection",
        "adaptive norm of the output",
    ]


def test_a_layer_that_does_not_fit_is_named():
    with pytest.raises(
        SchemeError,
        match=r"Layer 'small': Branch rank 8 is larger .* at most 4, or skip this layer",
    ):
        Plan.of({**SHAPES, "small": (4, 64)}, RECIPE)
    assert (
        Plan.of(
            {"small": (4, 64)}, Recipe(RECIPE.scheme, rules=(Rule("small", skip=True),))
        ).quantized
        == ()
    )


def test_a_model_is_planned_without_its_weights():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 64, bias=False))
    plan = plan_model(model, "mxfp4+w8a8-r8")
    assert {layer.name: layer.shape for layer in plan.layers} == {"0": (256, 64), "2": (64, 256)}
    assert plan_model(model, RECIPE).layers[0].scheme == RECIPE.scheme
    assert all(p.is_meta for p in model.parameters())


def test_a_recipe_that_cannot_be_read_makes_no_plan():
    with pytest.raises(RecipeError, match="Unknown branch 'w9a9'"):
        plan_model(nn.Sequential(nn.Linear(8, 8)), "mxfp4+w9a9")


def test_a_layer_that_is_weight_only_says_why():
    shapes = {
        "transformer_blocks.0.norm1.linear": (96, 64),
        "transformer_blocks.0.attn.to_q": (64, 64),
    }
    modulation, query = Plan.of(shapes, RECIPE, "FluxTransformer2DModel").layers
    assert (modulation.reason, query.reason) == ("modulation", "")
    assert (modulation.scheme, query.scheme) == (RECIPE.scheme.weight_only(), RECIPE.scheme)


def test_large_weights_that_are_not_linear_are_listed_with_what_they_are():
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Conv2d(8, 8, 3), nn.Embedding(300, 64), nn.LayerNorm(8000)
    )
    model.extra = nn.Conv2d(2, 2, 3)  # 36 weights: not worth a word
    plan = plan_model(model, "mxfp4+w8a8-r8")
    assert plan.others == (
        OtherWeight("1.weight", (8, 8, 3, 3), "not a linear layer, but Conv2d"),
        OtherWeight("2.weight", (300, 64), "not a linear layer, but Embedding"),
    )
    assert [other.nbytes for other in plan.others] == [2 * 576, 2 * 19200]
    assert plan.nbytes_bf16 == 2 * 64 * 64  # the totals are those of the linear layers


def test_weights_that_are_only_large_together_are_listed():
    model = nn.Sequential(
        nn.Linear(300, 300), *(nn.Conv2d(8, 8, 3) for _ in range(2)), nn.Conv2d(3, 3, 3, bias=False)
    )
    plan = plan_model(model, "mxfp4+w8a8-r8")  # 0.6 % each
    assert [other.name for other in plan.others] == ["1.weight", "2.weight", "3.weight"]
    assert not plan_model(model[:2], "mxfp4+w8a8-r8").others


def test_a_plan_of_shapes_knows_no_other_weights():
    assert Plan.of(SHAPES, RECIPE).others == ()


def test_a_rule_that_matches_nothing_is_warned_of(caplog):
    Plan.of(
        SHAPES,
        Recipe(Scheme("mxfp4"), rules=(Rule("encoder.*", skip=True), Rule("head", skip=True))),
    )
    assert [record.getMessage() for record in caplog.records] == [
        "The recipe's rule 'encoder.*' matches no linear layer of the model. Is its pattern right?"
    ]


def test_branches_larger_than_their_weights_are_warned_of_if_the_budget_sized_them(caplog):
    Plan.of({"wide": (1152, 1152)}, Recipe.named("mxfp4+w8a8"))
    Plan.of({"asked for": (64, 64)}, Recipe.named("mxfp4+w8a8-r48"))
    assert not caplog.records
    Plan.of({"wide": (1152, 1152), "narrow": (192, 192)}, Recipe.named("mxfp4+w8a8"))
    (record,) = caplog.records
    assert "The budget of r16=32 is large for narrow layers: in 1 of 2" in record.getMessage()
    assert "9.58 bits per weight in 'narrow'" in record.getMessage()
