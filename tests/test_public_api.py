"""The public names: adding or removing one is a decision, so the list stands here once more."""

import inspect
from importlib import import_module

import pytest

import loraq

PUBLIC = [
    "ActivationSchedule",
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
    "append_lora",
    "collect_pipeline_stats",
    "collect_stats",
    "dequantize_",
    "export",
    "get_format",
    "import_checkpoint",
    "load",
    "load_into",
    "load_stats",
    "plan_export",
    "plan_model",
    "quantize",
    "quantize_",
    "quantize_checkpoint",
    "quantize_weight",
    "remove_lora",
    "save",
    "save_stats",
    "set_activations",
    "set_backend",
]


def test_the_list_of_public_names_is_frozen():
    assert loraq.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(loraq))


def test_every_public_name_resolves_to_something_documented():
    wrong = []
    for name in PUBLIC:
        thing = getattr(loraq, name)
        text = inspect.getdoc(thing) or ""
        written = text and not text.startswith(f"{name}(")  # what a dataclass writes for itself
        if not (thing.__name__ == name and thing.__module__.startswith("loraq.") and written):
            wrong.append(name)
    assert not wrong


def test_every_public_name_is_the_same_object_as_at_home():
    homes = {name: getattr(import_module(loraq._HOMES[name]), name) for name in PUBLIC}
    assert not [name for name in PUBLIC if getattr(loraq, name) is not homes[name]]


def test_every_public_name_documents_its_own_members():
    bare = []
    for name in PUBLIC:
        thing = getattr(loraq, name)
        if not inspect.isclass(thing) or issubclass(thing, Exception):
            continue
        for key, member in vars(thing).items():
            is_code = callable(member) or isinstance(member, property | classmethod | staticmethod)
            if key.startswith("_") or key == "forward" or not is_code:
                continue
            if not inspect.getdoc(getattr(thing, key)):
                bare.append(f"{name}.{key}")
    assert not bare


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("quantize_weight", ["weight", "recipe", "*method", "*seed", "*name", "*stats"]),
        (
            "quantize_",
            [
                *("model", "recipe", "*effort", "*budget", "*rank", "*keep"),
                *("*modules_to_not_convert", "*stats", "*components", "*device", "*backend"),
                *("*dtype", "*workers", "*progress"),
            ],
        ),
        (
            "absorb_lora",
            [
                *("model", "lora", "source", "*scale", "*component", "*variant", "*target"),
                *("*device", "*overwrite", "*progress"),
            ],
        ),
        (
            "export",
            [
                *("source", "target", "*to", "*lora", "*pad_rank", "*allow_dense", "*dtype"),
                *("*shard_bytes", "*link", "*overwrite", "*verify", "*progress"),
            ],
        ),
        (
            "plan_export",
            ["source", "*to", "*lora", "*pad_rank", "*allow_dense", "*dtype", "*shard_bytes"],
        ),
        (
            "append_lora",
            ["model", "lora", "scale", "*name", "*component", "*target", "*overwrite", "*progress"],
        ),
        ("remove_lora", ["model", "name", "*component", "*target", "*overwrite", "*progress"]),
        ("plan_model", ["model", "recipe", "*workers", "*progress"]),
        ("set_activations", ["model", "precision", "*simulate"]),
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
