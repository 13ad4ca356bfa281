import sys

import pytest
import torch

from loraq.errors import LoraqError
from loraq.evaluation import digits
from loraq.evaluation.metrics import relative_error

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def transformer():
    return digits.load_transformer(torch.bfloat16)


@pytest.fixture(scope="module")
def exact_transformer():
    return digits.load_transformer(torch.float32)


@pytest.fixture(scope="module")
def judge():
    return digits.Judge.from_assets()


def test_real_digits_are_in_range_with_labels():
    images, labels = digits.real_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.unique().tolist() == list(range(10))


def test_class_tokens_differ_by_label_and_have_unit_variance():
    tokens = digits.class_tokens(torch.arange(digits.NULL_LABEL + 1))
    assert tokens.shape == (11, 4, 64)
    torch.testing.assert_close(tokens.std(dim=-1), torch.ones(11, 4))
    assert len(tokens.flatten(1).unique(dim=0)) == 11


def test_stored_weights_are_small_enough_to_ship():
    assert (
        sum(path.stat().st_size for path in digits.assets_folder().rglob("*") if path.is_file())
        < 12e6
    )


def test_transformer_loads_in_the_wanted_dtype(transformer, exact_transformer):
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in exact_transformer.parameters()} == {torch.float32}


def test_judge_reads_the_samples_as_the_digits_asked_for(transformer, judge):
    labels = torch.arange(60) % 10
    samples = digits.sample(transformer, labels, seed=1)
    assert samples.dtype == torch.float32
    assert samples.abs().max() <= 1
    assert judge.accuracy(samples, labels) >= 0.95


def test_judge_reads_real_digits_and_embeds_them(judge):
    images, labels = digits.real_digits()
    assert judge.accuracy(images, labels) >= 0.98
    assert judge.features(images[:3]).shape == (3, 32)


def test_first_samples_do_not_depend_on_the_batch_size(exact_transformer):
    labels = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    many = digits.sample(exact_transformer, labels, seed=5, steps=6)
    few = digits.sample(exact_transformer, labels[:3], seed=5, steps=6)
    torch.testing.assert_close(many[:3], few, rtol=0, atol=1e-4)


def test_samples_repeat_with_the_seed_and_change_with_it(transformer):
    labels = torch.tensor([7, 7])
    first, again, other = (
        digits.sample(transformer, labels, seed=seed, steps=3) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)
    assert not torch.allclose(first[0], first[1], atol=0.1)


def test_guidance_of_one_equals_the_captioned_velocity(exact_transformer):
    labels = torch.tensor([2, 8])
    plain = digits.sample(exact_transformer, labels, seed=0, steps=2, guidance=1.0)
    nearly = digits.sample(exact_transformer, labels, seed=0, steps=2, guidance=1.0 + 1e-6)
    torch.testing.assert_close(plain, nearly, rtol=0, atol=1e-4)


def test_velocity_probe_is_deterministic_for_a_seed(transformer):
    first, again = (
        digits.velocity_probe(transformer, count=32),
        digits.velocity_probe(transformer, count=32),
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, digits.velocity_probe(transformer, count=32, seed=1))


def test_velocity_probe_sees_the_rounding_to_bfloat16_and_little_else(
    transformer, exact_transformer
):
    error = relative_error(
        digits.velocity_probe(exact_transformer), digits.velocity_probe(transformer)
    )
    assert 1e-4 < error < 2e-2


@pytest.mark.parametrize(
    ("module", "call", "line"),
    [
        ("sklearn.datasets", digits.real_digits, r'pip install "loraq\[demo\]"'),
        ("diffusers", digits.load_transformer, r'pip install "loraq\[diffusers\]"'),
    ],
)
def test_missing_extra_names_the_install_line(monkeypatch, module, call, line):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LoraqError, match=line):
        call()
