import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from litgpt.lora import LoRASettings, add_lora, mark_only_lora_as_trainable
from litgpt.model import GPT
from litgpt.preference import (
    LOSSES,
    PreferenceObjective,
    dpo_loss,
    ipo_loss,
    kto_loss,
    mismatch,
    orpo_loss,
    simpo_loss,
    target_log_probs,
)

PAIRED = ["dpo", "ipo", "orpo", "simpo"]
LORA = LoRASettings(r=4, alpha=8, dropout=0.0, query=True, value=True)


class Bigram(nn.Module):
    """Logits from the current token alone: a model that is no GPT."""

    def __init__(self, vocab_size: int = 11) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx):
        return self.table(idx)


def tensors(*values):
    return torch.tensor(values)


def answer(prompt, completion):
    ids = torch.tensor([*prompt, *completion])
    labels = ids.clone()
    labels[: len(prompt)] = -100
    return ids, labels


def pair(prompt, chosen, rejected):
    (a, b), (c, d) = answer(prompt, chosen), answer(prompt, rejected)
    return {"chosen_input_ids": a, "chosen_labels": b, "rejected_input_ids": c, "rejected_labels": d}


def single(prompt, completion, desirable):
    ids, labels = answer(prompt, completion)
    return {"input_ids": ids, "labels": labels, "desirable": int(desirable)}


def random_pairs(n, vocab_size=300, seed=0):
    """Pairs of answers of uneven lengths."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low, high):
        length = int(torch.randint(low, high, (1,), generator=rng))
        return torch.randint(vocab_size, (length,), generator=rng).tolist()

    return [pair(draw(1, 9), draw(1, 12), draw(1, 12)) for _ in range(n)]


def random_singles(n, vocab_size=300):
    pairs = random_pairs(n, vocab_size)
    return [
        {"input_ids": e[f"{side}_input_ids"], "labels": e[f"{side}_labels"], "desirable": int(side == "chosen")}
        for i, e in enumerate(pairs)
        for side in (["chosen"] if i % 2 else ["rejected"])
    ]


def examples_for(loss, n):
    return random_singles(n) if loss == "kto" else random_pairs(n)


def collate(objective, examples):
    return objective.collate(examples, "train", torch.Generator())


@pytest.fixture
def model(tiny_config):
    model = GPT(tiny_config())
    model.init_weights()
    return model


@pytest.fixture
def lora_model(model):
    """A GPT whose LoRA has learnt something already."""
    add_lora(model, LORA)
    mark_only_lora_as_trainable(model)
    rng = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=rng)
    return model


def row_sums(model, rows):
    """Log-probability of each answer by itself, from full logits."""
    sums = []
    for ids, labels in rows:
        log_p = model(ids[None, :-1]).float().log_softmax(dim=-1)[0]
        picked = log_p.gather(1, labels[1:].clamp(min=0)[:, None])[:, 0]
        sums.append(picked[labels[1:] != -100].sum())
    return torch.stack(sums)


def test_dpo_and_ipo_have_the_published_values():
    chosen, rejected = tensors(-10.0) - tensors(-11.0), tensors(-12.0) - tensors(-11.5)
    assert dpo_loss(chosen, rejected, beta=0.1).item() == pytest.approx(0.6210, abs=5e-5)
    assert ipo_loss(chosen, rejected, beta=0.1).item() == pytest.approx(12.25)


def test_losses_at_equal_answers_are_their_known_constants():
    zero, half = tensors(0.0), tensors(math.log(0.5))
    assert dpo_loss(zero, zero).item() == pytest.approx(math.log(2))
    assert ipo_loss(zero, zero, beta=0.5).item() == pytest.approx(1.0)
    assert simpo_loss(half, half, gamma=0.0).item() == pytest.approx(math.log(2))
    assert orpo_loss(half, half, beta=0.3).item() == pytest.approx(math.log(2) * 1.3)
    assert kto_loss(zero, torch.tensor([True]), torch.tensor(0.0)).item() == pytest.approx(0.5)


def test_label_smoothing_mixes_the_loss_with_that_of_swapped_answers():
    chosen, rejected = tensors(0.7, -2.0), tensors(-0.4, 1.0)
    for loss in (dpo_loss, lambda *a, **k: simpo_loss(*a, gamma=0.0, **k)):
        mixed = 0.8 * loss(chosen, rejected) + 0.2 * loss(rejected, chosen)
        torch.testing.assert_close(loss(chosen, rejected, label_smoothing=0.2), mixed)


def test_simpo_gamma_is_the_margin_aimed_at():
    assert simpo_loss(tensors(-1.0), tensors(-1.5), beta=2.0, gamma=1.0).item() == pytest.approx(math.log(2))


def test_orpo_is_finite_at_probability_one_and_at_very_small_ones():
    chosen = tensors(0.0, -1e-9, -200.0).requires_grad_()
    losses = orpo_loss(chosen, tensors(-200.0, 0.0, -1e-9))
    losses.sum().backward()
    assert losses.isfinite().all() and chosen.grad.isfinite().all()


def test_kto_pushes_good_answers_up_and_bad_ones_down_by_their_weights():
    ratios = torch.tensor([0.0, 0.0], requires_grad=True)
    kto_loss(ratios, torch.tensor([True, False]), torch.tensor(0.0), 0.1, 1.0, 3.0).sum().backward()
    assert ratios.grad.tolist() == pytest.approx([-0.025, 0.075])


def test_collate_puts_chosen_rows_before_rejected_ones_and_trains_on_answers_only():
    batch = collate(PreferenceObjective(), [pair([1, 2], [3, 4], [5]), pair([6], [7], [8, 9])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [6, 7, 0], [1, 2, 5], [6, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 3, 4], [7, -100, -100], [-100, 5, -100], [8, 9, -100]]
    assert (batch["lengths"], batch["start"]) == ([3, 1, 2, 2], 0)


def test_collate_for_kto_adds_each_prompt_with_the_answer_to_the_next():
    batch = collate(PreferenceObjective("kto"), [single([1, 2], [3], 1), single([4], [5, 6], 0)])
    assert batch["input_ids"].tolist() == [[1, 2], [4, 5], [1, 2], [4, 3]]
    assert batch["labels"].tolist() == [[-100, 3], [5, 6], [-100, 5], [3, -100]]
    assert batch["desirable"].tolist() == [True, False]


def test_mismatched_answers_are_never_longer_than_the_batch():
    ids, labels = mismatch(answer([1, 2, 3], [4]), answer([5], [6, 7, 8]), 4)
    assert (ids.tolist(), labels.tolist()) == ([1, 2, 3, 6], [-100, -100, -100, 6])


@pytest.mark.parametrize("row_by_row", [True, False])
def test_log_probs_are_those_of_each_answer_alone(model, row_by_row):
    examples = random_pairs(3)
    objective = PreferenceObjective("simpo", row_by_row=row_by_row)
    rows = [(e[f"{side}_input_ids"], e[f"{side}_labels"]) for side in ("chosen", "rejected") for e in examples]
    torch.testing.assert_close(objective.log_probs(model, collate(objective, examples)), row_sums(model, rows))


def test_log_probs_of_a_model_that_is_no_gpt_come_from_its_logits():
    torch.manual_seed(0)
    model, examples, objective = Bigram(), random_pairs(2, 11), PreferenceObjective("orpo", row_by_row=True)
    rows = [(e[f"{side}_input_ids"], e[f"{side}_labels"]) for side in ("chosen", "rejected") for e in examples]
    torch.testing.assert_close(objective.log_probs(model, collate(objective, examples)), row_sums(model, rows))


def test_log_probs_in_chunks_have_the_gradient_of_whole_logits(monkeypatch):
    monkeypatch.setattr("litgpt.preference.LOGITS_CHUNK_BYTES", 4 * 7 * 2)  # two tokens
    logits = torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.randint(7, (2, 5)).masked_fill(torch.rand(2, 5) < 0.3, -100)
    weights = torch.randn(2, 5)
    (target_log_probs(logits, labels) * weights).sum().backward()
    grad, logits.grad = logits.grad, None
    whole = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    (whole.view(2, 5) * weights).sum().backward()
    torch.testing.assert_close(grad, logits.grad)


def n_calls(objective, model, batch):
    """How often a loss asks the model."""
    calls = []
    with model.register_forward_hook(lambda *_: calls.append(1)):
        objective.loss(model, batch)
    return len(calls)


def test_gpt_is_asked_row_by_row_where_logits_are_large_and_the_head_is_frozen(model, monkeypatch):
    objective = PreferenceObjective("simpo")
    batch = collate(objective, random_pairs(3))
    model.lm_head.requires_grad_(False)
    assert n_calls(objective, model, batch) == 1
    monkeypatch.setattr("litgpt.preference.WHOLE_LOGITS_BYTES", 1000)
    assert n_calls(objective, model, batch) == 6
    model.lm_head.requires_grad_(True)
    assert n_calls(objective, model, batch) == 1


def test_several_devices_make_as_many_calls_as_each_other(model, monkeypatch):
    monkeypatch.setattr("litgpt.preference.rank_and_world", lambda: (0, 2))
    model.lm_head.requires_grad_(False)
    objective = PreferenceObjective("simpo")
    assert [n_calls(objective, model, collate(objective, random_pairs(2, seed=i))) for i in range(3)] == [4] * 3


def test_reference_under_lora_is_the_base_model_and_keeps_the_policy(lora_model, tiny_config):
    base = GPT(tiny_config())
    base.load_state_dict(
        {k.replace(".linear.", "."): v for k, v in lora_model.state_dict().items() if "lora_" not in k}
    )
    objective = PreferenceObjective()
    batch = collate(objective, random_pairs(2))
    policy = objective.log_probs(lora_model, batch)
    reference = objective.reference_log_probs(lora_model, batch)
    torch.testing.assert_close(reference, objective.log_probs(base, batch))
    assert not reference.requires_grad and not torch.allclose(policy, reference)
    torch.testing.assert_close(objective.log_probs(lora_model, batch), policy)


def test_reference_is_without_dropout_and_leaves_the_model_in_training(tiny_config):
    model = GPT(tiny_config(dropout=0.5))
    model.init_weights()
    add_lora(model, LORA)
    objective = PreferenceObjective()
    batch = collate(objective, random_pairs(2))
    state = torch.get_rng_state()
    first, second = (objective.reference_log_probs(model, batch) for _ in range(2))
    assert torch.equal(first, second) and model.training and torch.equal(state, torch.get_rng_state())


def test_reference_from_the_examples_is_taken_as_it_is(lora_model):
    objective, examples = PreferenceObjective(), random_pairs(2)
    batch = collate(objective, examples)
    expected = objective.loss(lora_model, batch)
    table = objective.reference_log_probs(lora_model, batch).view(2, 2)
    with_reference = [{**e, "reference": table[:, i]} for i, e in enumerate(examples)]
    objective.reference = None  # what follows must not ask for it
    out = objective.loss(lora_model, collate(objective, with_reference))
    torch.testing.assert_close(out, expected)


def test_a_loss_with_reference_refuses_a_model_that_has_none(model):
    objective = PreferenceObjective()
    with pytest.raises(ValueError, match="needs a reference model"):
        objective.loss(model, collate(objective, random_pairs(1)))


@pytest.mark.parametrize("loss", PAIRED)
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(loss, lora_model):
    objective, examples = PreferenceObjective(loss), random_pairs(8)
    results = []
    for size in (1, 2, 4, 8):
        lora_model.zero_grad()
        outs = [objective.loss(lora_model, collate(objective, examples[i : i + size])) for i in range(0, 8, size)]
        sum(out["loss"] / 8 for out in outs).backward()
        totals = {name: sum(out[name].item() for out in outs) / 8 for name in outs[0]}
        results.append((totals, [p.grad.clone() for p in lora_model.parameters() if p.grad is not None]))
    for totals, grads in results[1:]:
        assert totals == pytest.approx(results[0][0], rel=1e-5, abs=1e-6)
        for grad, expected in zip(grads, results[0][1]):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("loss", [*LOSSES])
def test_parts_of_the_loss_are_detached_sums(loss, lora_model):
    objective = PreferenceObjective(loss)
    out = objective.loss(lora_model, collate(objective, examples_for(loss, 4)))
    assert out["loss"].requires_grad and out["n"] == 4
    assert {"accuracy", "margin"} <= set(out)
    assert not any(value.requires_grad for name, value in out.items() if name != "loss")
    assert 0 <= out["accuracy"] <= 4


def test_margin_is_the_difference_of_rewards(lora_model):
    objective = PreferenceObjective("dpo", beta=0.3)
    out = objective.loss(lora_model, collate(objective, random_pairs(3)))
    assert out["margin"].item() == pytest.approx((out["chosen_reward"] - out["rejected_reward"]).item(), abs=1e-5)


def test_kto_estimates_the_distance_from_mismatched_answers(lora_model):
    objective, examples = PreferenceObjective("kto"), random_singles(3)
    batch = collate(objective, examples)
    out = objective.loss(lora_model, batch)
    policy, reference = objective.log_probs(lora_model, batch), objective.reference_log_probs(lora_model, batch)
    kl = (policy - reference)[3:].mean().clamp(min=0)
    desirable = torch.tensor([bool(e["desirable"]) for e in examples])
    torch.testing.assert_close(out["kl"] / 3, kl.detach())
    torch.testing.assert_close(out["loss"], kto_loss((policy - reference)[:3], desirable, kl, 0.1).sum())


def test_kto_with_a_single_answer_takes_the_distance_as_zero(lora_model):
    objective = PreferenceObjective("kto")
    out = objective.loss(lora_model, collate(objective, [single([1], [2, 3], 1)]))
    assert out["kl"] == 0 and out["loss"].isfinite()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(loss="ppo"), "choose one of dpo, ipo, orpo, simpo, kto"),
        (dict(beta=0.0), "--beta is 0.0"),
        (dict(label_smoothing=0.5), "--label_smoothing is 0.5"),
        (dict(loss="kto", undesirable_weight=-1.0), "--undesirable_weight is -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceObjective(**settings)


def toy_examples(loss, n):
    """The better answer says the last token of the prompt again, the worse one says something else."""
    rng = torch.Generator().manual_seed(7)
    examples = []
    for i in range(n):
        prompt = torch.randint(16, (4,), generator=rng).tolist()
        good = [prompt[-1]]
        bad = [(prompt[-1] + int(torch.randint(1, 16, (1,), generator=rng))) % 16]
        if loss == "kto":
            examples.append(single(prompt, good if i % 2 else bad, i % 2))
        else:
            examples.append(pair(prompt, good, bad))
    return examples


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("loss", [*LOSSES])
def test_each_loss_learns_to_prefer_the_better_answer(loss, is_lora, tiny_config):
    torch.manual_seed(0)
    model = GPT(tiny_config(padded_vocab_size=16, vocab_size=16))
    model.init_weights()
    reference = copy.deepcopy(model)
    if is_lora:
        add_lora(model, LoRASettings(r=8, alpha=32, query=True, key=True, value=True, projection=True, mlp=True))
        mark_only_lora_as_trainable(model)

    from contextlib import nullcontext

    objective = PreferenceObjective(loss, reference=None if is_lora else lambda _: nullcontext(reference))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    examples = toy_examples(loss, 32 * 60)
    for i in range(0, len(examples), 32):
        out = objective.loss(model, collate(objective, examples[i : i + 32]))
        (out["loss"] / out["n"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    judge = PreferenceObjective("dpo", reference=lambda _: nullcontext(reference))
    with torch.no_grad():
        out = judge.loss(model, collate(judge, toy_examples("dpo", 32 * 63)[-64:]))
    assert out["accuracy"].item() / 64 > 0.95
