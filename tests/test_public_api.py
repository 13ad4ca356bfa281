"""The public names: adding or removing one is a decision, so the list stands here once more."""

import inspect
from importlib import import_module

import pytest

import loraq

PUBLIC = [
    "ActivationStats",
    "Branch",
    "Budget",
    "LayerSolution",
    "LoraqError",
    "PackedWeight",
    "QTensor",
    "QuantizedLinear",
    "Recipe",
    "Rule",
    "Scheme",
    "absorb_lora",
    "collect_pipeline_stats",
    "collect_stats",
    "get_format",
    "load",
    "load_into",
    "load_stats",
    "plan_model",
    "quantize_",
    "quantize_checkpoint",
    "quantize_weight",
    "save",
    "save_stats",
    "set_backend",
]


def test_the_list_of_public_names_is_frozen():
    assert loraq.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(loraq))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_resolves_to_something_documented(name):
    thing = getattr(loraq, name)
    assert thing.__name__ == name
    assert thing.__module__.startswith("loraq.")
    assert inspect.getdoc(thing)
    assert not inspect.getdoc(thing).startswith(
        f"{name}("
    )  # the text that a dataclass writes for itself


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_the_same_object_as_at_home(name):
    assert getattr(loraq, name) is getattr(import_module(loraq._HOMES[name]), name)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_documents_its_own_members(name):
    thing = getattr(loraq, name)
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        own = {
            key: member
            for key, member in vars(thing).items()
            if not key.startswith("_") and key != "forward"
        }
        bare = [
            key
            for key, member in own.items()
            if callable(member) or isinstance(member, property | classmethod | staticmethod)
            if not inspect.getdoc(getattr(thing, key))
        ]
        assert not bare


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("quantize_weight", ["weight", "recipe", "*method", "*seed", "*name", "*stats"]),
        ("quantize_", ["model", "recipe", "*stats", "*workers", "*progress"]),
        (
            "absorb_lora",
            ["model", "lora", "source", "*scale", "*target", "*overwrite", "*progress"],
        ),
        ("plan_model", ["model", "recipe", "*workers", "*progress"]),
        ("set_backend", ["model", "name"]),
    ],
)
def test_what_a_call_takes_is_frozen_and_options_are_keyword_only(name, parameters):
    signature = inspect.signature(getattr(loraq, name))
    star = {inspect.Parameter.KEYWORD_ONLY: "*"}
    assert [star.get(p.kind, "") + p.name for p in signature.parameters.values()] == parameters


def test_the_version_is_a_plain_string():
    assert loraq.__version__.count(".") == 2


@pytest.mark.parametrize("name", ["quantise_", "torch_", "__nothing__"])
def test_an_unknown_attribute_raises_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'loraq' has no attribute '{name}'"):
        getattr(loraq, name)


def test_a_star_import_brings_the_public_names_and_no_others():
    namespace = {}
    exec("from loraq import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(PUBLIC)
