import math

import pytest
import torch

from litgpt.generate.sampling import Sampler, draw, sample_top_p

LOGITS = torch.tensor([1.2, -0.3, 2.0, 0.1, 1.9, -4.0])


def expected_probs(temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """The formulas, one token at a time in plain Python."""
    logits = LOGITS.tolist()
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = set(ranked[:top_k])
    weights = [math.exp(logits[i] / temperature) if i in kept else 0.0 for i in range(len(logits))]
    probs = [weight / sum(weights) for weight in weights]
    nucleus, mass = set(), 0.0
    for i in ranked:
        if mass < top_p:
            nucleus.add(i)
        mass += probs[i]
    probs = [p if i in nucleus and p >= min_p * max(probs) else 0.0 for i, p in enumerate(probs)]
    return torch.tensor([p / sum(probs) for p in probs])


SETTINGS = [
    {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 3}, {"top_k": 6}, {"top_k": 99},
    {"top_p": 0.3}, {"top_p": 0.75}, {"top_p": 0.999}, {"min_p": 0.3}, {"min_p": 1.0},
    {"top_k": 4, "temperature": 0.7, "top_p": 0.8},
    {"top_k": 5, "temperature": 2.0, "top_p": 0.9, "min_p": 0.25}, {"temperature": 2.0, "top_p": 0.6},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampler_draws_by_the_formulas(settings):
    n, rng = 20_000, torch.Generator().manual_seed(3)
    probs = expected_probs(**settings)
    counts = torch.bincount(Sampler(**settings)(LOGITS.expand(n, -1), rng), minlength=len(LOGITS))
    assert counts[probs == 0].sum() == 0
    chi_square = ((counts - n * probs) ** 2 / (n * probs))[probs > 0].sum()
    assert chi_square < 25  # at most 5 degrees of freedom: p = 1e-4


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"top_p": 0}, {"temperature": 0, "top_k": 2}, {"top_p": 1e-9}]
)
def test_zero_temperature_or_top_p_takes_the_most_likely(settings):
    logits = torch.randn(50, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampler(**settings)(logits), logits.argmax(-1))


def test_tiny_temperature_and_half_precision_stay_finite():
    logits = torch.tensor([[60000.0, 59000.0, -60000.0]], dtype=torch.float16)
    for settings in ({"temperature": 1e-30}, {"temperature": 1e-30, "top_p": 0.5}, {"min_p": 0.5}):
        assert Sampler(**settings)(logits).item() == 0


def test_masked_tokens_are_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0]).expand(2000, -1)
    for settings in ({}, {"top_k": 3}, {"top_p": 0.99}):
        assert set(Sampler(**settings)(logits).tolist()) == {1, 3}


def test_same_seed_same_tokens():
    def tokens(seed):
        return Sampler()(LOGITS.expand(100, -1), torch.Generator().manual_seed(seed)).tolist()

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 1.5}, r"top_p 1\.5 is outside \[0, 1\]"),
        ({"top_p": -0.1}, r"top_p -0\.1 is outside"),
        ({"top_p": math.nan}, "top_p nan"),
        ({"min_p": 2}, "min_p 2 is outside"),
        ({"temperature": -1}, "temperature -1 is negative"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": 0}, "top_k 0 is below 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]]).log()
    assert (sample_top_p(logits[0], 0.49) > -math.inf).tolist() == [False, True, False, False]
    assert (sample_top_p(logits[0], 0.6) > -math.inf).tolist() == [False, True, True, False]
    assert (sample_top_p(logits[0], 0.0) > -math.inf).tolist() == [False, True, False, False]
    kept = sample_top_p(logits, 0.6)
    assert (kept > -math.inf).sum(-1).tolist() == [2, 3]
    assert torch.equal(kept[kept > -math.inf], logits[kept > -math.inf])


def test_draw_takes_unnormalised_probabilities():
    probs = torch.tensor([2.0, 0.0, 6.0]).expand(4000, -1)
    counts = torch.bincount(draw(probs, torch.Generator().manual_seed(0)), minlength=3)
    assert counts[1] == 0 and abs(counts[2] / 4000 - 0.75) < 0.03
