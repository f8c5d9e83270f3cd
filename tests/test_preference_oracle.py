"""The losses against those of trl, where it is installed. Its versions keep them in different places."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from litgpt.preference import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss

pytestmark = pytest.mark.slow

N = 64


def trl_function(trainer, name):
    """The method `name` of a trainer of trl, which works on any object with its settings."""
    pytest.importorskip("trl")
    folder = trainer.removesuffix("Trainer").lower()
    for module in (f"trl.trainer.{folder}_trainer", f"trl.experimental.{folder}.{folder}_trainer"):
        try:
            function = getattr(getattr(importlib.import_module(module), trainer), name, None)
        except (ImportError, RuntimeError):
            continue
        if function is not None:
            return function
    pytest.skip(f"this version of trl has no {trainer}.{name}")


def settings(**values):
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x)
    return SimpleNamespace(accelerator=accelerator, alpha=0.0, **values)


@pytest.fixture
def log_probs():
    """Summed log-probabilities `(4, N)`: policy chosen, policy rejected, reference chosen, reference rejected."""
    return -30 * torch.rand(4, N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_equals_trl(log_probs, smoothing):
    function = trl_function("DPOTrainer", "dpo_loss")
    args = dict(beta=0.3, label_smoothing=smoothing, reference_free=False, f_divergence_type="reverse_kl")
    expected = function(settings(**args, use_weighting=False), *log_probs, "sigmoid", {})[0]
    policy, reference = log_probs.view(2, 2, N)
    torch.testing.assert_close(dpo_loss(*(policy - reference), 0.3, smoothing), expected)


def test_ipo_equals_trl(log_probs):
    function = trl_function("DPOTrainer", "dpo_loss")
    args = dict(beta=0.3, label_smoothing=0.0, reference_free=False, f_divergence_type="reverse_kl")
    expected = function(settings(**args, use_weighting=False), *log_probs, "ipo", {})[0]
    policy, reference = log_probs.view(2, 2, N)
    torch.testing.assert_close(ipo_loss(*(policy - reference), 0.3), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo"])
def test_simpo_and_the_losses_of_log_ratios_equal_trl(log_probs, loss_type, smoothing):
    function = trl_function("CPOTrainer", "cpo_loss")
    chosen, rejected = log_probs[:2] / 10
    stub = settings(beta=2.0, simpo_gamma=0.7, label_smoothing=smoothing, loss_type=loss_type)
    ours = {
        "sigmoid": lambda: dpo_loss(chosen, rejected, 2.0, smoothing),
        "ipo": lambda: ipo_loss(chosen, rejected, 2.0),
        "simpo": lambda: simpo_loss(chosen, rejected, 2.0, 0.7, smoothing),
    }
    torch.testing.assert_close(ours[loss_type](), function(stub, chosen, rejected)[0])


def test_orpo_equals_trl(log_probs):
    function = trl_function("ORPOTrainer", "odds_ratio_loss")
    chosen, rejected = (log_probs[:2] / 10 - 1e-3).float()
    ratio = function(settings(beta=0.3), chosen, rejected)[0]
    torch.testing.assert_close(orpo_loss(chosen, rejected, 0.3), -chosen - ratio)


def test_kto_equals_trl(log_probs):
    function = trl_function("KTOTrainer", "kto_loss")
    policy_kl, reference_kl = -10 * torch.rand(2, N, dtype=torch.float64) - torch.tensor([[0.0], [5.0]])
    stub = settings(beta=0.3, calculate_KL=True, loss_type="kto", desirable_weight=1.3, undesirable_weight=0.6)
    policy, reference = log_probs.view(2, 2, N)
    expected, *_, kl = function(stub, *policy, policy_kl, *reference, reference_kl)
    desirable = torch.arange(2 * N) < N
    ratios = (policy - reference).flatten()
    assert kl > 1
    torch.testing.assert_close(kto_loss(ratios, desirable, kl, 0.3, 1.3, 0.6), expected)
