"""Tuning a model on preferences: which of two answers is better, or whether one answer is good.

The losses, then `PreferenceObjective`, which gives them the log-probabilities of the answers under the model that is
tuned (the policy) and under the one it started from (the reference).

Letters in shapes: B pairs or unpaired answers, R rows of the batch, T tokens, K tokens whose logits are needed, V
vocabulary.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from litgpt.data.base import rank_and_world
from litgpt.lora import disabled, lora_layers
from litgpt.objective import IGNORE_INDEX, Objective, Split, accepts

LossName = Literal["dpo", "ipo", "orpo", "simpo", "kto"]

LOGITS_CHUNK_BYTES = 2**27
"""Float32 bytes of the logits that are turned into log-probabilities at a time."""

WHOLE_LOGITS_BYTES = 2**28
"""Float32 bytes of a batch's logits up to which it is one call of the model; above, each row is one."""

MIN_ODDS_GAP = 1e-6
"""ORPO's odds are infinite at probability 1, which float32 reaches: log-probabilities stay this far below 0."""


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv 2305.18290): `-log sigmoid(beta * (chosen - rejected))` of the summed log-ratios.

    Args:
        chosen: `(B,)` log-ratios `log policy(answer) - log reference(answer)` of the better answers.
        rejected: `(B,)` those of the worse answers.
        beta: Weight of staying near the reference.
        label_smoothing: Probability that a pair is the wrong way round (conservative DPO); below 0.5.

    Returns:
        `(B,)` losses.
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """IPO (arXiv 2310.12036): `(chosen - rejected - 1 / (2 beta))^2`, so that the margin stays finite.

    The log-ratios are means over the tokens of an answer, without which long answers would set the margin.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def simpo_loss(
    chosen: Tensor, rejected: Tensor, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """SimPO (arXiv 2405.14734): `-log sigmoid(beta * (chosen - rejected) - gamma)`, without a reference.

    `chosen` and `rejected` `(B,)` are mean log-probabilities per token, `gamma` the margin that is aimed at.
    """
    margin = beta * (chosen - rejected) - gamma
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """ORPO (arXiv 2403.07691): `-chosen - beta * log sigmoid(log_odds(chosen) - log_odds(rejected))`, no reference.

    `chosen` and `rejected` `(B,)` are mean log-probabilities per token; the first term is the usual loss of finetuning,
    and `beta` is the lambda of the paper.
    """
    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (arXiv 2402.01306): `weight * (1 - sigmoid(+-beta * (log_ratio - kl)))`, + for a desirable answer.

    Args:
        log_ratios: `(B,)` log-ratios of single answers, summed over their tokens.
        desirable: `(B,)` boolean, True = a good answer.
        kl: Scalar, how far the policy is from the reference; without gradient.
        beta: Weight of staying near the reference.
        desirable_weight: Weight of the good answers; weight times number should be about equal for good and bad ones.
        undesirable_weight: Weight of the bad answers.

    Returns:
        `(B,)` losses.
    """
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(sign * beta * (log_ratios - kl)))


def log_odds(log_prob: Tensor) -> Tensor:
    """`log(p / (1 - p))` of log-probabilities."""
    log_prob = log_prob.clamp(max=-MIN_ODDS_GAP)
    return log_prob - torch.log(-torch.expm1(log_prob))


@dataclass(frozen=True)
class LossKind:
    """What a loss wants to be given."""

    function: Callable[..., Tensor]
    beta: float
    """Default of its beta."""
    has_reference: bool
    """Whether it compares with the reference model."""
    is_mean: bool
    """Whether log-probabilities are means over an answer's tokens; else sums."""
    options: tuple[str, ...] = ()
    """Further settings that it knows."""


LOSSES: dict[str, LossKind] = {
    "dpo": LossKind(dpo_loss, 0.1, has_reference=True, is_mean=False, options=("label_smoothing",)),
    "ipo": LossKind(ipo_loss, 0.1, has_reference=True, is_mean=True),
    "orpo": LossKind(orpo_loss, 0.1, has_reference=False, is_mean=True),
    "simpo": LossKind(simpo_loss, 2.0, has_reference=False, is_mean=True, options=("gamma", "label_smoothing")),
    "kto": LossKind(
        kto_loss, 0.1, has_reference=True, is_mean=False, options=("desirable_weight", "undesirable_weight")
    ),
}

Reference = Callable[[nn.Module], AbstractContextManager[nn.Module]]
"""Given the policy, a context in which the module that it yields is the reference model."""


class PreferenceObjective(Objective):
    """Preference tuning as an objective, for any model and any method.

    An example is a pair `{"chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"}` of int64
    `(T,)`, the labels aligned with the ids and -100 on the prompt; KTO takes single answers `{"input_ids", "labels",
    "desirable"}` with `desirable` 0 or 1. A pair may bring `reference`, the log-probabilities `(2,)` of its two answers
    under the reference, summed over their tokens.

    `loss` gives sums over pairs (KTO: answers) and their number, so that no split into micro batches changes a step,
    with one exception: KTO estimates the distance from the reference in each micro batch, as the paper does.

    Args:
        loss: Which loss.
        beta: Its beta; None takes 0.1, and 2.0 for SimPO.
        label_smoothing: DPO and SimPO: probability that a pair is the wrong way round.
        gamma: SimPO: margin that is aimed at.
        desirable_weight: KTO: weight of good answers.
        undesirable_weight: KTO: weight of bad answers.
        reference: How to get at the reference model, for the losses that compare with it. None: the policy itself with
            its LoRA switched off, which needs no second copy.
        row_by_row: Whether each row is a call of the model of its own, which never holds logits; None decides, see
            `ModelTraits.wants_rows`.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(
        self,
        loss: LossName = "dpo",
        beta: float | None = None,
        label_smoothing: float = 0.0,
        gamma: float = 1.0,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reference: Reference | None = None,
        row_by_row: bool | None = None,
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"--loss {loss!r} is not known: choose one of {', '.join(get_args(LossName))}.")
        self.name, self.kind = loss, LOSSES[loss]
        self.beta = self.kind.beta if beta is None else beta
        if not self.beta > 0:
            raise ValueError(f"--beta is {beta}: it must be greater than 0; {loss} is used with {self.kind.beta}.")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"--label_smoothing is {label_smoothing}: it must be 0 or more, and less than 0.5.")
        for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
            if weight < 0:
                raise ValueError(f"--{name} is {weight}: it must be 0 or more.")
        options = {"label_smoothing": label_smoothing, "gamma": gamma}
        options |= {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        self.options = {name: options[name] for name in self.kind.options}
        self.reference, self.row_by_row = reference, row_by_row
        self._traits: weakref.WeakKeyDictionary[nn.Module, ModelTraits] = weakref.WeakKeyDictionary()

    def collate(self, examples: Sequence[Mapping[str, Any]], split: Split, rng: torch.Generator) -> dict[str, Any]:
        """`input_ids` and shifted `labels` `(R, T)`, padded on the right: the chosen rows, then the rejected ones.

        For KTO: the answers, then, if there are two or more, each prompt with the answer to the next one.
        `lengths` has the tokens up to the last target of each row, `start` the first token with a target in any row.
        """
        if self.name == "kto":
            rows = [(example["input_ids"], example["labels"]) for example in examples]
            longest = max(len(ids) for ids, _ in rows)
            if len(rows) > 1:
                rows += [mismatch(row, other, longest) for row, other in zip(rows, rows[1:] + rows[:1])]
        else:
            rows = [(e[f"{side}_input_ids"], e[f"{side}_labels"]) for side in ("chosen", "rejected") for e in examples]
        idx = pad_sequence([ids for ids, _ in rows], batch_first=True)[:, :-1]
        labels = pad_sequence([row for _, row in rows], batch_first=True, padding_value=IGNORE_INDEX)[:, 1:]
        is_target = labels != IGNORE_INDEX  # (R, T)
        lengths = ((torch.arange(labels.size(1)) + 1) * is_target).amax(dim=1).clamp(min=1).tolist()
        start = int(is_target.any(dim=0).int().argmax())
        batch = {"input_ids": idx.contiguous(), "labels": labels.contiguous(), "lengths": lengths, "start": start}
        if self.name == "kto":  # its mismatched rows are made here, so that their reference cannot be known before
            batch["desirable"] = torch.tensor([bool(example["desirable"]) for example in examples])
        elif self.kind.has_reference and all("reference" in example for example in examples):
            batch["reference"] = torch.stack([example["reference"] for example in examples], dim=1).flatten()  # (R,)
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Summed loss and number of pairs or answers, with sums of what tells how the tuning goes.

        `accuracy`: pairs with the higher reward for the chosen answer, or answers whose reward is on the right side of
        the average one. `margin`: reward of chosen less that of rejected. A reward is beta times what the loss
        compares: log-ratio or mean log-probability.
        """
        return self._unpaired_loss(model, batch) if self.name == "kto" else self._paired_loss(model, batch)

    def _paired_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        policy = self.log_probs(model, batch)  # (2 * B,)
        n_targets = (batch["labels"] != IGNORE_INDEX).sum(dim=1).clamp(min=1)
        scores = policy - self.reference_log_probs(model, batch) if self.kind.has_reference else policy
        chosen, rejected = (scores / n_targets if self.kind.is_mean else scores).chunk(2)  # (B,), (B,)
        losses = self.kind.function(chosen, rejected, beta=self.beta, **self.options)
        chosen, rejected = self.beta * chosen.detach(), self.beta * rejected.detach()
        chosen_log_prob, rejected_log_prob = policy.detach().chunk(2)
        parts = {"accuracy": (chosen > rejected).float(), "margin": chosen - rejected}
        parts |= {"chosen_reward": chosen, "rejected_reward": rejected}
        parts |= {"chosen_log_prob": chosen_log_prob, "rejected_log_prob": rejected_log_prob}
        n = torch.tensor(losses.numel(), device=losses.device)
        return {"loss": losses.sum(), "n": n, **{name: part.sum() for name, part in parts.items()}}

    def _unpaired_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        desirable = batch["desirable"]
        n_answers, n_rows = len(desirable), len(batch["labels"])
        policy = self.log_probs(model, batch, slice(0, n_answers))  # (B,)
        reference = self.reference_log_probs(model, batch)  # (R,)
        kl = torch.zeros_like(reference[0])
        if n_rows > n_answers:  # one answer alone has no other to be mismatched with
            with quiet(model):
                mismatched = self.log_probs(model, batch, slice(n_answers, n_rows))
            kl = (mismatched - reference[n_answers:]).mean().clamp(min=0)
        log_ratios = policy - reference[:n_answers]
        losses = self.kind.function(log_ratios, desirable, kl, beta=self.beta, **self.options)
        margin = self.beta * (log_ratios.detach() - kl) * torch.where(desirable, 1.0, -1.0)
        parts = {"accuracy": (margin > 0).float(), "margin": margin, "kl": kl.expand(n_answers)}
        n = torch.tensor(n_answers, device=losses.device)
        return {"loss": losses.sum(), "n": n, **{name: part.sum() for name, part in parts.items()}}

    def reference_log_probs(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """`(R,)` summed log-probabilities under the reference: those in the batch, or worked out without gradient."""
        if "reference" in batch:
            return batch["reference"]
        if self.reference is None and not any(True for _ in lora_layers(model)):
            raise ValueError(f"--loss {self.name} needs a reference model, and this one has no LoRA to switch off.")
        with (self.reference or disabled)(model) as reference, quiet(reference):
            return self.log_probs(reference, batch)

    def log_probs(self, model: nn.Module, batch: Mapping[str, Any], rows: slice = slice(None)) -> Tensor:
        """Log-probability of each row's targets, summed over its tokens: `(R,)` float32."""
        idx, labels, lengths = batch["input_ids"][rows], batch["labels"][rows], batch["lengths"][rows]
        if model not in self._traits:
            self._traits[model] = ModelTraits.of(model)
        traits, T, start = self._traits[model], max(lengths), min(batch["start"], max(lengths) - 1)
        row_by_row = traits.takes_targets and self.row_by_row
        if self.row_by_row is None:
            row_by_row = traits.wants_rows(len(idx) * (T - start))
        if row_by_row:
            spans = [(slice(i, i + 1), slice(0, n)) for i, n in enumerate(lengths)]
            return -torch.stack([model(idx[span], targets=labels[span])[0].float() for span in spans])
        idx, labels = idx[:, :T], labels[:, start:T]
        logits = model(idx, logits_to_keep=T - start) if traits.takes_logits_to_keep else model(idx)[:, start:]
        return target_log_probs(logits, labels).sum(dim=1)


@dataclass(frozen=True)
class ModelTraits:
    """What decides how a model is asked for log-probabilities."""

    takes_targets: bool
    takes_logits_to_keep: bool
    head: tuple[Tensor, ...]
    """Weight and bias of its head, without LoRA."""

    @classmethod
    def of(cls, model: nn.Module) -> "ModelTraits":
        head = [p for name, p in model.named_parameters() if "lm_head." in name and ".lora_" not in name]
        return cls(accepts(model, "targets"), accepts(model, "logits_to_keep"), tuple(head))

    def wants_rows(self, n_logits: int) -> bool:
        """Whether to call the model once a row instead of once a batch, whose logits of `n_logits` tokens are large.

        A GPT that is given `targets` holds no logits and no padding, but returns one sum a call. With a trainable head
        each call also keeps the gradient of the head, which is as large as the head; logits of the answers alone are
        smaller then. Several devices must make as many calls as each other, whatever their batches are.
        """
        if not self.takes_targets or not self.head or (torch.is_grad_enabled() and self.head[0].requires_grad):
            return False
        return rank_and_world()[1] > 1 or 4 * n_logits * self.head[0].size(0) > WHOLE_LOGITS_BYTES


def mismatch(row: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], max_length: int) -> tuple[Tensor, Tensor]:
    """The prompt of `row` with the answer of `other`, as `(ids, labels)`; at most `max_length` tokens are kept."""
    (ids, labels), (other_ids, other_labels) = row, other
    prompt, other_prompt = (int((x != IGNORE_INDEX).int().argmax()) for x in (labels, other_labels))
    ids = torch.cat([ids[:prompt], other_ids[other_prompt:]])[:max_length]
    return ids, torch.cat([labels[:prompt], other_labels[other_prompt:]])[:max_length]


def target_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of `labels` `(R, K)` under `logits` `(R, K, V)`, 0 where a label is -100, in float32.

    A few tokens at a time, and worked out again on the way back: nothing of the size of the logits is kept but they.
    """
    flat, targets = logits.flatten(0, 1), labels.flatten()
    chunk = max(1, LOGITS_CHUNK_BYTES // (4 * flat.size(1)))

    def run(part: Tensor, part_targets: Tensor) -> Tensor:
        return -F.cross_entropy(part.float(), part_targets, ignore_index=IGNORE_INDEX, reduction="none")

    parts = [checkpoint(run, *x, use_reentrant=False) for x in zip(flat.split(chunk), targets.split(chunk))]
    return torch.cat(parts).view_as(labels)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Without gradient and without dropout."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            model.train()
