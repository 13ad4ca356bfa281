"""The tables of the quality benchmark: every row can be
planned, and the ways to share fit a budget.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("benchmarks")
pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from benchmarks.quality.field import OWN_SMOOTHING
from benchmarks.quality.sharing import WAYS, rank_rules, share_otherwise
from benchmarks.quality.tables import (
    COMPARISONS,
    CONTENDERS,
    WEIGHED,
    all_tables,
    round_activations,
)
from benchmarks.worlds.world import OWN_SAMPLES, OWN_SENSITIVITY, WORLDS
from loraq.evaluation import digits
from loraq.evaluation.contender import simulate
from loraq.layers import quantized_layers
from loraq.pipeline.module import plan_model, quantize_
from loraq.recipe import Recipe


@pytest.fixture(scope="module")
def model():
    return digits.load_transformer(torch.float32)


@pytest.mark.parametrize("name", WORLDS)
def test_every_row_is_a_recipe_with_a_label_of_its_own_and_a_known_source(name):
    world, tables = WORLDS[name], all_tables(name)
    assert list(tables)[: len(CONTENDERS)] == list(CONTENDERS)
    for title, rows in tables.items():
        assert len({(row.label, row.recipe, row.budget) for row in rows}) == len(rows), title
        for row in rows:
            row.to_recipe(budget=world.budget, effort="fast")
            assert not row.statistics or row.statistics in world.sources, (title, row.label)


def test_with_samples_there_is_each_table_once_more_weighed_by_sensitivity():
    weighed = {title for title in COMPARISONS if title.endswith(WEIGHED)}
    sampled = {title for title, c in COMPARISONS.items() if c.statistics == OWN_SAMPLES}
    assert weighed == {title + WEIGHED for title in sampled}
    for title in sampled:
        plain, other = COMPARISONS[title], COMPARISONS[title + WEIGHED]
        assert (plain.declared, plain.beside, plain.bar) == (
            other.declared,
            other.beside,
            other.bar,
        )
        assert {row.statistics for row in other.entrants} == {OWN_SENSITIVITY}
        # Such statistics do not tell calls apart, by which smoothing would be gated.
        ungated = [row for row in plain.entrants if row.smoothing != OWN_SMOOTHING]
        assert ungated == [replace(row, statistics=OWN_SAMPLES) for row in other.entrants]


@pytest.mark.parametrize("way", WAYS)
def test_ranks_shared_otherwise_store_no_more_and_differ(model, way, monkeypatch):
    if way == "measured":  # the solver is not what is tested here
        monkeypatch.setattr("benchmarks.quality.sharing.solve_layer", fake_solution)
    recipe = replace(Recipe.named("mxfp4-a8+w6a8"), budget="r16=5", keep="float")
    uniform = plan_model(model, recipe)
    probe = partial(digits.velocity_probe, count=8)
    shared = plan_model(model, share_otherwise(model, recipe, way=way, probe=probe))
    assert 0.99 * uniform.nbytes < shared.nbytes <= uniform.nbytes
    ranks = [
        {job.name: job.scheme.branch.rank for job in plan.quantized} for plan in (uniform, shared)
    ]
    assert ranks[0] != ranks[1]
    assert [job.scheme.activation for job in uniform.quantized] == [
        job.scheme.activation for job in shared.quantized
    ]


def fake_solution(job, weight):
    class Solution:
        def reconstruct(self):
            return weight * 0.99

    return Solution()


def test_rules_for_ranks_make_the_same_plan(model):
    recipe = replace(Recipe.named("mxfp4+w6a8"), budget="r16=5")
    plan = plan_model(model, recipe)
    again = plan_model(model, replace(recipe, budget="r16=9", rules=tuple(rank_rules(plan))))
    assert [job.scheme for job in again.quantized] == [job.scheme for job in plan.quantized]


def test_formats_of_activations_change_and_weights_do_not(model):
    from copy import deepcopy

    few = [f"transformer_blocks.0.attn1.to_{part}" for part in "qk"]
    rules = [{"match": name} for name in few] + [{"match": "*", "skip": True}]
    recipe = {**Recipe.named("mxfp4-a16+w8a8-r4").to_dict(), "method": "svdquant", "rules": rules}
    quantized = deepcopy(model)
    quantize_(quantized, Recipe.from_dict(recipe), progress=False)
    simulate(quantized)
    before = digits.velocity_probe(quantized, count=8)
    round_activations(("mxint8", "mxfp6_e2m3", "int8"), quantized)
    schemes = [layer.scheme for layer in quantized_layers(quantized).values()]
    assert [(s.activation, s.branch.activation, s.branch.intermediate) for s in schemes] == [
        ("mxint8", "mxfp6_e2m3", "int8")
    ] * 2
    assert not torch.equal(digits.velocity_probe(quantized, count=8), before)
