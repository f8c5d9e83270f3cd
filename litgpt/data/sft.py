"""Finetuning data: samples to token ids with labels, and the data module that all such data sets share."""

import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, random_split

from litgpt.chat_template import ChatTemplate
from litgpt.class_path import class_path, init_args
from litgpt.data.base import DataModule, cache_folder, rank_and_world
from litgpt.data.batching import ExampleLoader
from litgpt.data.conversations import as_conversation
from litgpt.data.encoding import TrainOn, encode_conversation, prompt_text, show_tokens
from litgpt.data.packing import as_one_row
from litgpt.data.preparation import tokenizer_hash
from litgpt.data.tokenized import TokenizedExamples
from litgpt.prompts import PromptStyle

TooLong = Literal["cut", "drop", "error"]

TEMPLATE = "template"
"""Prompt style that is the chat template of the tokenizer."""


@dataclass
class SampleEncoder:
    """Turns a sample into `{"input_ids", "labels", "token_counts", "faults"}`; None leaves it out. Can be pickled."""

    tokenizer: Any
    prompt_style: PromptStyle
    max_seq_length: int = -1
    train_on: TrainOn = "all"
    ignore_index: int = -100
    too_long: TooLong = "cut"
    transform: Callable[[Any], Any] | None = None
    vocab_size: int | None = None

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any] | None:
        if self.transform is not None:
            sample = self.transform(dict(sample))  # a copy, so that one that takes keys out can be called again
        conversation = as_conversation(sample)
        example = encode_conversation(conversation, self.tokenizer, self.prompt_style, self.train_on, self.ignore_index)
        length, limit = len(example["input_ids"]), self.max_seq_length
        is_long = 0 < limit < length
        if is_long and self.too_long == "error":
            raise ValueError(
                f"has {length} tokens, more than the {limit} of --train.max_seq_length or the model; raise that, or "
                "set --data.too_long to cut or drop"
            )
        if is_long and self.too_long == "drop":
            return None
        ids, labels = (example[key][:limit] if is_long else example[key] for key in ("input_ids", "labels"))
        if self.vocab_size is not None and len(ids) and (largest := int(ids.max())) >= self.vocab_size:
            raise ValueError(
                f"the tokenizer gives id {largest}, the model's vocabulary ends at {self.vocab_size - 1}: they do not "
                "belong together"
            )
        counts = {"raw": min(example["raw"], limit) if limit > 0 else example["raw"]}
        counts["raw_plus_prompt_template"] = len(ids)
        faults = {"cut": int(is_long), "masked": int((labels[1:] == self.ignore_index).all())}
        return {"input_ids": ids, "labels": labels, "token_counts": counts, "faults": faults}

    def key(self) -> list[str]:
        """What decides about the examples besides the samples."""
        style = [class_path(type(self.prompt_style)), str(init_args(self.prompt_style, "the cache"))]
        code = getattr(self.transform, "__code__", None)
        source = "" if code is None else f"{code.co_code.hex()} {code.co_consts} {code.co_names}"
        limits = (self.max_seq_length, self.train_on, self.ignore_index, self.too_long, self.vocab_size)
        return [tokenizer_hash(self.tokenizer), str(self.tokenizer.use_bos), *style, str(limits), source]


class SFTDataset(Dataset):
    """Samples as training examples `{"input_ids": (T,), "labels": (T,), "token_counts": {...}}`.

    The labels stand under the tokens that they repeat; the loss shifts them. What is not learnt has `ignore_index`.

    Args:
        data: Samples: dicts with `instruction`, `output`, optionally `input` and other keys that the prompt style
            uses, or conversations in any form of `litgpt.data.conversations`.
        tokenizer: Encodes the text.
        prompt_style: A style or its name.
        max_seq_length: Longer examples are cut; -1: never.
        mask_prompt: Learn the answers only. Without it, the prompt is learnt too.
        ignore_index: Label of what is not learnt.
        transform: Called with a copy of each sample before anything else.
        train_on: Which part is learnt; None leaves it to `mask_prompt`.
        too_long: What happens to examples of more than `max_seq_length` tokens.
        vocab_size: Ids must be below this, if it is given.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        prompt_style: str | PromptStyle,
        max_seq_length: int = -1,
        mask_prompt: bool = True,
        ignore_index: int = -100,
        transform: Callable[[Any], Any] | None = None,
        *,
        train_on: TrainOn | None = None,
        too_long: TooLong = "cut",
        vocab_size: int | None = None,
    ) -> None:
        self.data, self.tokenizer, self.transform = data, tokenizer, transform
        self.prompt_style = PromptStyle.from_name(prompt_style) if isinstance(prompt_style, str) else prompt_style
        self.max_seq_length, self.mask_prompt, self.ignore_index = max_seq_length, mask_prompt, ignore_index
        train_on = train_on or ("assistant" if mask_prompt else "all")
        self.encoder = SampleEncoder(
            tokenizer, self.prompt_style, max_seq_length, train_on, ignore_index, too_long, transform, vocab_size
        )
        self.examples: TokenizedExamples | None = None

    def __len__(self) -> int:
        return len(self.data) if self.examples is None else len(self.examples)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        example = self.examples[idx] if self.examples is not None else self.encoder(self.data[idx])
        if example is None:
            raise ValueError(f"sample {idx} is too long; call prepare() first, which leaves such samples out")
        return {key: value for key, value in example.items() if key != "faults"}

    def prepare(self, cache_dir: Path | str | None, num_workers: int = 1) -> "SFTDataset":
        """Tokenise all samples now, or take what an earlier run has kept in `cache_dir`."""
        if self.transform is not None and not hasattr(self.transform, "__code__"):
            cache_dir = None  # nobody can tell whether it is the one of the earlier run
        self.examples = TokenizedExamples(self.data, self.encoder, cache_dir, self.encoder.key(), num_workers)
        return self

    @property
    def lengths(self) -> Any:
        """Tokens of each example `(n,)`."""
        if self.examples is None:
            self.prepare(None)
        return self.examples.lengths


def get_sft_collate_fn(
    max_seq_length: int = -1, pad_id: int = 0, ignore_index: int = -100
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """A function that makes a batch of examples: padded on the right to the longest, cut to `max_seq_length` if set.

    The batch is `{"input_ids": (B, T), "labels": (B, T), "token_counts": {"raw": (B, 1), ...}}`.
    """
    return Collate(max_seq_length, pad_id, ignore_index)


@dataclass
class Collate:
    """What `get_sft_collate_fn` returns; an object, so that the processes of a loader can have it."""

    max_seq_length: int = -1
    pad_id: int = 0
    ignore_index: int = -100

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for key, padding in (("input_ids", self.pad_id), ("labels", self.ignore_index)):
            rows = pad_sequence([sample[key] for sample in samples], batch_first=True, padding_value=padding)  # (B, T)
            batch[key] = rows[:, : self.max_seq_length] if self.max_seq_length > 0 else rows
        names = samples[0].get("token_counts", {})
        counts = {name: torch.tensor([[int(sample["token_counts"][name])] for sample in samples]) for name in names}
        return {**batch, "token_counts": counts}


@dataclass(kw_only=True)
class SFTDataModule(DataModule):
    """What finetuning data sets share. A subclass says where the samples come from: `load_samples`."""

    mask_prompt: bool = False
    """Learn the answers only. Without it, the prompt is learnt too, unless --data.train_on says otherwise."""
    prompt_style: str | PromptStyle = "alpaca"
    """How an instruction is dressed: a prompt style, or "template" for the chat template of the tokenizer."""
    ignore_index: int = -100
    """Label of tokens that are not learnt."""
    seed: int = 42
    """Decides which samples are for validation, and the order of the others."""
    num_workers: int = 4
    """Processes that tokenise. Reading the tokens needs none."""
    train_on: TrainOn | None = None
    """What is learnt: "assistant" all answers, "last" the last one of each conversation, "marked" the messages that
    say `"train": true`, "all" every token. Default: what --data.mask_prompt says."""
    too_long: TooLong = "cut"
    """What happens to samples of more tokens than --train.max_seq_length: "cut" the end off, "drop", "error"."""
    pack: bool = False
    """Put several samples into one row of --train.max_seq_length tokens, without letting them see each other."""
    group_by_length: bool = False
    """Put samples of similar length into a batch, so that less is padded."""
    preview: int = 0
    """Print so many samples as the model sees them, what is not learnt in [[double brackets]]."""
    cache_dir: Path | None = None
    """Folder for the tokenised samples, which the next run on the same data reads. Default: the cache of litgpt."""

    tokenizer: Any = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)
    vocab_size: int | None = field(default=None, init=False, repr=False)
    train_dataset: SFTDataset | None = field(default=None, init=False, repr=False)
    test_dataset: SFTDataset | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.prompt_style, str) and self.prompt_style != TEMPLATE:
            self.prompt_style = PromptStyle.from_name(self.prompt_style)
        if self.pack and self.group_by_length:
            raise ValueError("--data.pack and --data.group_by_length exclude each other: packed rows are all full")

    @abstractmethod
    def load_samples(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        """The training and the validation samples; the latter may be empty."""

    def transform(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with the keys that a conversation or instruction has, where the data set has others."""
        return sample

    def connect(
        self,
        tokenizer: Any | None = None,
        batch_size: int = 1,
        max_seq_length: int | None = None,
        vocab_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        """As the base; ids that reach `vocab_size`, the model's `padded_vocab_size`, are refused."""
        self.tokenizer, self.batch_size, self.vocab_size = tokenizer, batch_size, vocab_size
        self.max_seq_length = -1 if max_seq_length is None else max_seq_length
        self.train_dataset = self.test_dataset = None
        if self.prompt_style == TEMPLATE and tokenizer is not None:
            self.prompt_style = ChatTemplate.from_checkpoint(tokenizer.checkpoint_dir)

    def setup(self, stage: str = "") -> None:
        if self.train_dataset is not None:
            return
        train, val = self.load_samples()
        if not len(train):
            raise ValueError("no sample is left for training; give more data or a smaller --data.val_split_fraction")
        if not len(val):
            warnings.warn(
                f"the validation split has 0 of {len(train)} samples, so there will be no validation loss; give a "
                "larger --data.val_split_fraction or a file of validation samples",
                stacklevel=2,
            )
        self.train_dataset = self._dataset(train, "training")
        self.test_dataset = self._dataset(val, "validation")
        if self.preview and rank_and_world()[0] == 0:
            self.print_preview(self.train_dataset)

    def _dataset(self, samples: Sequence[Mapping[str, Any]], name: str) -> SFTDataset:
        transform = None if type(self).transform is SFTDataModule.transform else self.transform
        dataset = SFTDataset(
            samples, self.tokenizer, self.prompt_style, self.max_seq_length, self.mask_prompt, self.ignore_index,
            transform, train_on=self.train_on, too_long=self.too_long, vocab_size=self.vocab_size,
        )  # fmt: skip
        if len(samples):
            dataset.prepare(self.cache_dir or cache_folder() / "sft", self.num_workers)
            report_faults(dataset, name)
        return dataset

    def train_dataloader(self) -> ExampleLoader:
        self.setup()
        return self._loader(self.train_dataset, shuffle=True)

    def val_dataloader(self) -> ExampleLoader | None:
        self.setup()
        return self._loader(self.test_dataset, shuffle=False) if len(self.test_dataset) else None

    def _loader(self, dataset: SFTDataset, shuffle: bool) -> ExampleLoader:
        longest = int(self.train_dataset.lengths.max())
        row = self.max_seq_length if self.max_seq_length > 0 else longest
        return ExampleLoader(
            dataset,
            self.batch_size,
            as_one_row if self.pack else get_sft_collate_fn(self.max_seq_length, ignore_index=self.ignore_index),
            seed=self.seed,
            shuffle=shuffle,
            group_by_length=self.group_by_length and shuffle,
            pack_into=row if self.pack else None,
        )

    def example_prompt(self, sample: Mapping[str, Any]) -> str:
        """The text that a model continues with the last answer of `sample`."""
        return prompt_text(as_conversation(self.transform(dict(sample))), self.prompt_style)

    def print_preview(self, dataset: SFTDataset) -> None:
        """Print the first samples, and what of each is learnt."""
        for n in range(min(self.preview, len(dataset))):
            example = dataset[n]
            n_learnt = int((example["labels"] != self.ignore_index).sum())
            print(f"--- sample {n + 1}: {len(example['labels'])} tokens, {n_learnt} learnt")
            print(marked_text(self.tokenizer, example["input_ids"], example["labels"] != self.ignore_index))


def marked_text(tokenizer: Any, ids: Tensor, learnt: Tensor) -> str:
    """Text of `ids` `(T,)`, special tokens shown; what is not learnt is dim on a terminal, else in double brackets."""
    opening, closing = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    edges = [0, *(torch.nonzero(learnt[1:] != learnt[:-1]).flatten() + 1).tolist(), len(ids)]
    parts = []
    for start, end in pairwise(edges):
        text = show_tokens(tokenizer, ids[start:end].tolist())
        parts.append(text if start < end and learnt[start] else f"{opening}{text}{closing}")
    return "".join(parts)


def report_faults(dataset: SFTDataset, name: str) -> None:
    """Say how many samples were cut, left out, or teach nothing.

    Raises:
        ValueError: Nothing at all can be learnt from the samples.
    """
    examples, n = dataset.examples, len(dataset.data)
    if not len(examples):
        raise ValueError(f"all {n} {name} samples have more than {dataset.max_seq_length} tokens; --data.too_long cut")
    n_cut, n_masked = (int(examples.totals.get(f"faults/{fault}", 0)) for fault in ("cut", "masked"))
    if n_masked == len(examples):
        why = f"{n_cut} were cut before their first answer" if n_cut else "see --data.train_on and --data.mask_prompt"
        raise ValueError(f"nothing is learnt from any of the {n} {name} samples: all their tokens are masked ({why})")
    found = []
    if n_cut:
        found.append(f"{n_cut} cut to {dataset.max_seq_length} tokens")
    if examples.n_left_out:
        found.append(f"{examples.n_left_out} left out, as they are longer than {dataset.max_seq_length} tokens")
    if n_masked:
        found.append(f"{n_masked} teach nothing, as all their tokens are masked")
    if found and rank_and_world()[0] == 0:
        warnings.warn(f"of {n:,} {name} samples: {'; '.join(found)}", stacklevel=2)


def split_samples(
    samples: Sequence[Mapping[str, Any]], fraction: float, seed: int
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Samples for training and, at random, about `fraction` of them for validation."""
    if not 0 <= fraction < 1:
        raise ValueError(f"--data.val_split_fraction is {fraction}; it must be at least 0 and less than 1")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Length of split")  # `setup` says it in its own words
        parts = random_split(range(len(samples)), [1 - fraction, fraction], torch.Generator().manual_seed(seed))
    train, val = ([samples[i] for i in part.indices] for part in parts)
    return train, val
