"""What a model is trained to do: how examples become a batch, what the loss is, and how the model then generates.

Letters in shapes: B batch, T tokens, V vocabulary.
"""

import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Split = Literal["train", "eval", "predict"]

IGNORE_INDEX = -100
"""Label of a position that is not trained on."""

PADDING_SEGMENT = -1
"""Number of the document that padding belongs to, in packed batches."""


class Objective:
    """A training objective. The training loops know nothing of it but these four methods.

    To train something else than the next token, subclass it, override `collate` and `loss`, and register the class::

        class MaskedTokens(Objective):
            def collate(self, examples, split, rng):
                idx = torch.stack([e["input_ids"] for e in examples])
                hidden = torch.rand(idx.shape, generator=rng) < 0.15
                return {"input_ids": idx.masked_fill(hidden, MASK), "labels": idx.masked_fill(~hidden, -100)}

            def loss(self, model, batch):
                logits, labels = model(batch["input_ids"]), batch["labels"]
                losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                return {"loss": losses, "n": (labels != -100).sum()}

        register_objective("masked-tokens", MaskedTokens)

    and train it with `litgpt pretrain MODEL --objective masked-tokens --extend my_file.py`.

    One object serves a whole run and keeps no state between batches, so that a resumed run continues exactly.
    """

    def collate(self, examples: Sequence[Mapping[str, Any]], split: Split, rng: torch.Generator) -> dict[str, Tensor]:
        """Turn examples into one batch on the CPU; the loop moves it to the device.

        Args:
            examples: What the data module yields; in pretraining each is `{"input_ids": (T + 1,) int64}`.
            split: "train"; "eval" for validation; "predict" for batches that hold prompts.
            rng: The only allowed source of randomness, seeded from the run's seed, the rank and the micro batch.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to collate examples.")

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The summed loss of a batch and the number of its terms; a mean in a formula is `loss / n`.

        The loop divides by the number of terms over all micro batches and devices.

        Args:
            model: Call it as `model(...)` and use no other method of it: it may be compiled, sharded or replicated.
            batch: What `collate` returned, on the model's device.

        Returns:
            `{"loss": scalar with gradient, "n": scalar count}`. Further entries are detached scalar sums of parts of
            the loss, logged under their names after division by n.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its loss is.")

    def predict(self, model: nn.Module, prompt: Tensor, **sampling: Any) -> dict[str, Any]:
        """Generate from prompts.

        Args:
            model: The trained model, in evaluation mode.
            prompt: `(B, T)` token ids; never changed.
            sampling: Settings of the generation, such as `max_new_tokens` and `temperature`.

        Returns:
            `{"ids": (B, S), "lengths": (B,), "steps": int}`: prompt and continuation, how many ids of each row count,
            and the number of model calls; a family may add the `history` of its steps.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot generate.")

    def metrics(self, batch: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """What validation reports of a batch and its `loss`: `{name: (sum, count)}`, added up, then divided."""
        return {name: (value, out["n"]) for name, value in out.items() if name != "n"}


class NextToken(Objective):
    """Predict each next token from those before it. Works with a GPT and with any module `forward(idx) -> logits`."""

    def __init__(self) -> None:
        self._takes_targets: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def collate(self, examples: Sequence[Mapping[str, Any]], split: Split, rng: torch.Generator) -> dict[str, Tensor]:
        """`{"input_ids": (B, T), "labels": (B, T)}`, the labels shifted by one; shorter rows are padded, not trained.

        An example may bring its own `labels`, aligned with its ids, with -100 where nothing is to be learnt; and where
        it is packed, `segment_ids`, the number of each token's document, and `positions`.
        """
        rows = [example["input_ids"] for example in examples]
        label_rows = [example.get("labels", row) for example, row in zip(examples, rows, strict=True)]
        idx = pad_sequence(rows, batch_first=True)
        labels = pad_sequence(label_rows, batch_first=True, padding_value=IGNORE_INDEX)[:, 1:].contiguous()
        batch = {"input_ids": idx[:, :-1].contiguous(), "labels": labels}
        for key, padding in (("segment_ids", PADDING_SEGMENT), ("positions", 0)):
            if key in examples[0]:
                values = pad_sequence([e[key] for e in examples], batch_first=True, padding_value=padding)
                batch[key] = values[:, :-1].contiguous()
                if key == "segment_ids":  # no document begins in the one before
                    labels.masked_fill_(values[:, 1:] != values[:, :-1], IGNORE_INDEX)
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summed cross-entropy in float32. A GPT computes it without ever holding all logits."""
        idx, labels = batch["input_ids"], batch["labels"]
        packed = {key: batch[key] for key in ("segment_ids", "positions") if key in batch}
        if model not in self._takes_targets:
            self._takes_targets[model] = accepts(model, "targets")
        if packed and not all(accepts(model, key) for key in packed):
            raise ValueError(
                f"The data is packed, but this model takes no {' and '.join(packed)}: set --data.pack false"
            )
        if self._takes_targets[model]:
            loss, n = model(idx, targets=labels, **packed)
            return {"loss": loss, "n": n}
        logits = model(idx, **packed).float().flatten(0, 1)  # (B * T, V)
        loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return {"loss": loss, "n": (labels != IGNORE_INDEX).sum()}

    @torch.no_grad()
    def predict(
        self,
        model: nn.Module,
        prompt: Tensor,
        *,
        max_new_tokens: int = 50,
        temperature: float = 0.0,
        top_k: int | None = None,
        eos_id: int | None = None,
        rng: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """Append one token at a time, reading the whole sequence anew for each: slow, but right for any model.

        `litgpt generate` uses the cached decoding of `litgpt.generate.base` for a GPT instead.

        Args:
            model: Gives logits `(B, T, V)` for ids `(B, T)`.
            prompt: `(B, T)`, all rows of one length.
            max_new_tokens: At most so many tokens are added to each row.
            temperature: 0 takes the most likely token.
            top_k: Sample among so many of the most likely tokens; None: among all.
            eos_id: A row ends with this token.
            rng: Source of the sampling.
        """
        ids, steps = prompt, 0
        lengths = torch.full((prompt.size(0),), prompt.size(1), device=prompt.device)  # (B,)
        alive = torch.ones_like(lengths, dtype=torch.bool)  # (B,)
        while steps < max_new_tokens and alive.any():
            logits = model(ids)[:, -1].float()  # (B, V)
            if top_k is not None:
                logits = logits.masked_fill(
                    logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:], -torch.inf
                )
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=rng)  # (B, 1)
            else:
                token = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            ids, steps, lengths = torch.cat([ids, token], dim=1), steps + 1, lengths + alive
            if eos_id is not None:
                alive &= token.squeeze(1) != eos_id
        return {"ids": ids, "lengths": lengths, "steps": steps}


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether `forward` takes the keyword `argument`, also behind wrappers that pass everything on."""
    parameters = inspect.signature(model.forward).parameters
    if argument in parameters:
        return True
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return False
    inner = [getattr(model, name, None) for name in ("_forward_module", "_orig_mod", "module")]
    return any(isinstance(module, nn.Module) and accepts(module, argument) for module in inner)
