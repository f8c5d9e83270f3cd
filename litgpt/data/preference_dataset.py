"""Preferences as token ids, kept on disk, with the log-probabilities of a reference model beside them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from litgpt.checkpoint.atomic import atomic_file
from litgpt.class_path import class_path, init_args
from litgpt.data.base import rank_and_world
from litgpt.data.conversations import Conversation, Message, as_preference, as_unpaired
from litgpt.data.encoding import encode_conversation
from litgpt.data.preparation import tokenizer_hash
from litgpt.data.sft import TooLong
from litgpt.data.tokenized import TokenizedExamples
from litgpt.prompts import PromptStyle

IGNORE_INDEX = -100
"""Label of what is not compared."""


@dataclass
class PreferenceEncoder:
    """Turns a sample into the ids and labels of its answers; None leaves it out. Can be pickled.

    A pair becomes `{"chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"}`, a single answer
    `{"input_ids", "labels", "desirable"}`; ids and labels are `(T,)` int64, labels -100 on the prompt.
    """

    tokenizer: Any
    prompt_style: PromptStyle
    max_seq_length: int = -1
    too_long: TooLong = "cut"
    vocab_size: int | None = None

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any] | None:
        if "chosen" in sample:
            pair = as_preference(sample)
            answers = [self._encode(pair.prompt, answer, pair.tools) for answer in (pair.chosen, pair.rejected)]
        else:
            single = as_unpaired(sample)
            answers = [self._encode(single.prompt, single.completion, single.tools)]
        limit = self.max_seq_length if self.max_seq_length > 0 else max(len(ids) for ids, _ in answers)
        is_long = any(len(ids) > limit for ids, _ in answers)
        if is_long and self.too_long == "error":
            raise ValueError(
                f"has an answer that ends at token {max(len(ids) for ids, _ in answers)}, above the {limit} of "
                "--train.max_seq_length or the model; raise that, or set --data.too_long to cut or drop"
            )
        answers = [(ids[:limit], labels[:limit]) for ids, labels in answers]
        is_bare = any(bool((labels[1:] == IGNORE_INDEX).all()) for _, labels in answers)  # the prompt fills it
        if is_bare or (is_long and self.too_long == "drop"):
            return None
        faults = {"cut": int(is_long), "equal": 0}
        if len(answers) == 1:
            (ids, labels) = answers[0]
            return {"input_ids": ids, "labels": labels, "desirable": int(single.label), "faults": faults}
        (chosen, chosen_labels), (rejected, rejected_labels) = answers
        faults["equal"] = int(torch.equal(chosen, rejected))
        example = {"chosen_input_ids": chosen, "chosen_labels": chosen_labels}
        return {**example, "rejected_input_ids": rejected, "rejected_labels": rejected_labels, "faults": faults}

    def _encode(
        self, prompt: Sequence[Message], answer: Sequence[Message], tools: list[Any] | None
    ) -> tuple[Tensor, Tensor]:
        """Ids and labels of a prompt with an answer, of which only the answer's own messages are compared."""
        asked = [{**message, "train": False} for message in prompt]
        answered = [{**message, "train": True} for message in answer]
        conversation = Conversation([*asked, *answered], tools)
        example = encode_conversation(conversation, self.tokenizer, self.prompt_style, "marked", IGNORE_INDEX)
        ids = example["input_ids"]
        if self.vocab_size is not None and len(ids) and (largest := int(ids.max())) >= self.vocab_size:
            raise ValueError(
                f"the tokenizer gives id {largest}, the model's vocabulary ends at {self.vocab_size - 1}: they do not "
                "belong together"
            )
        return ids, example["labels"]

    def key(self) -> list[str]:
        """What decides about the examples besides the samples."""
        style = [class_path(type(self.prompt_style)), str(init_args(self.prompt_style, "the cache"))]
        limits = (self.max_seq_length, self.too_long, self.vocab_size)
        return ["preferences", tokenizer_hash(self.tokenizer), str(self.tokenizer.use_bos), *style, str(limits)]


class PreferenceDataset(Dataset):
    """Tokenised preferences, with the reference's log-probabilities where they were worked out before.

    Args:
        data: The samples.
        encoder: Encodes one of them.
        cache_dir: Folder of the tokenised samples, and of the log-probabilities.
        num_workers: Processes that tokenise.
        reference_key: Says what the reference is; log-probabilities found in the cache under it are used.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        encoder: PreferenceEncoder,
        cache_dir: Path,
        num_workers: int = 1,
        reference_key: str | None = None,
    ) -> None:
        self.data, self.examples = data, TokenizedExamples(data, encoder, cache_dir, encoder.key(), num_workers)
        self.reference_path: Path | None = None
        self.reference: Tensor | None = None
        if reference_key is not None:
            self.reference_path = self.examples.path.with_suffix(f".{reference_key}.npy")
            if self.reference_path.is_file():
                self.reference = torch.from_numpy(np.load(self.reference_path, allow_pickle=False))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = {key: value for key, value in self.examples[index].items() if key != "faults"}
        return example if self.reference is None else {**example, "reference": self.reference[index]}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example `(n,)`, both answers counted."""
        return self.examples.lengths

    def save_reference(self, reference: Tensor) -> None:
        """Keep the log-probabilities `(n, 2)` of the chosen and the rejected answers, for this run and later ones."""
        with atomic_file(self.reference_path) as file:
            np.save(file, reference.numpy(), allow_pickle=False)
        self.reference = reference


def reference_table(
    dataset: PreferenceDataset, log_probs: Callable[[list[dict[str, Any]]], Tensor], batch_size: int
) -> Tensor:
    """This rank's share of the log-probabilities of all pairs: `(n, 3)`, the third column counts how often.

    All ranks make as many calls as each other, so some pairs are worked out twice.

    Args:
        dataset: The pairs.
        log_probs: Those of a list of examples: chosen rows, then rejected ones.
        batch_size: Pairs given to it at once.
    """
    rank, world = rank_and_world()
    order = np.argsort(dataset.lengths, kind="stable")
    n_calls = math.ceil(len(order) / (batch_size * world))
    order = np.resize(order, n_calls * world * batch_size).reshape(n_calls, world, batch_size)
    table = torch.zeros(len(dataset), 3, dtype=torch.float64)
    for numbers in order[:, rank]:
        found = log_probs([dataset[int(i)] for i in numbers]).double().cpu().view(2, -1)
        table[torch.from_numpy(numbers)] = torch.stack([*found, torch.ones(batch_size, dtype=torch.float64)], dim=1)
    return table
