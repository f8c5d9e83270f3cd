"""Pairs of a better and a worse answer, or single answers that were liked or not, from files of your own."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt.chat_template import ChatTemplate
from litgpt.data.base import DataModule, cache_folder, rank_and_world
from litgpt.data.batching import ExampleLoader
from litgpt.data.conversations import Conversation, as_preference, as_unpaired, kind_of
from litgpt.data.encoding import prompt_text
from litgpt.data.preference_dataset import IGNORE_INDEX, PreferenceDataset, PreferenceEncoder
from litgpt.data.rows import Rows, find_splits, read_files, read_rows
from litgpt.data.sft import TEMPLATE, TooLong, marked_text, split_samples
from litgpt.prompts import PromptStyle

DEFAULT_FRACTION = 0.05
"""Share of the samples of a single file that is for validation."""


@dataclass
class Preferences(DataModule):
    """Preferences from JSON, JSON Lines, CSV or Parquet: rows with prompt, chosen and rejected (texts or lists of
    messages), or, for KTO, with prompt, completion and label (true or false)."""

    json_path: Path
    """A file (.json, .jsonl, .csv, .parquet), a folder with files called train and val, or a folder with a data set of
    Hugging Face."""
    val_split_fraction: float | None = field(default=None, kw_only=True)
    """Share of the samples that is kept for validation; not with a folder that has such samples. Default: 0.05."""
    prompt_style: str | PromptStyle = field(default="alpaca", kw_only=True)
    """How a prompt is dressed: a prompt style, or "template" for the chat template of the tokenizer."""
    too_long: TooLong = field(default="cut", kw_only=True)
    """What happens to samples with more tokens than --train.max_seq_length: "cut" the end off, "drop" them, or
    "error". Samples of which no answer is left are dropped."""
    group_by_length: bool = field(default=False, kw_only=True)
    """Put samples of similar length into a batch, so that less is padded."""
    seed: int = field(default=42, kw_only=True)
    """Decides which samples are for validation, and the order of the others."""
    num_workers: int = field(default=4, kw_only=True)
    """Processes that tokenise. Reading the tokens needs none."""
    preview: int = field(default=0, kw_only=True)
    """Print so many samples as the model sees them, the prompt in [[double brackets]]."""
    cache_dir: Path | None = field(default=None, kw_only=True)
    """Folder for the tokenised samples, which the next run on the same data reads. Default: the cache of litgpt."""

    unpaired: bool = field(default=False, init=False, repr=False)
    """Whether single answers are wanted, as for KTO; a pair then is two of them."""
    reference_key: str | None = field(default=None, init=False, repr=False)
    tokenizer: Any = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)
    vocab_size: int | None = field(default=None, init=False, repr=False)
    train_dataset: PreferenceDataset | None = field(default=None, init=False, repr=False)
    test_dataset: PreferenceDataset | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.json_path = Path(self.json_path).expanduser()
        if isinstance(self.prompt_style, str) and self.prompt_style != TEMPLATE:
            self.prompt_style = PromptStyle.from_name(self.prompt_style)
        if not self.json_path.exists():
            raise FileNotFoundError(
                f"--data.json_path {self.json_path} does not exist: it names a file of preferences, or a folder with "
                "files called train and val"
            )

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
            raise ValueError(f"{self.json_path}: no sample is left for training; lower --data.val_split_fraction")
        if not len(val):
            warnings.warn(
                f"the validation split has 0 of {len(train)} samples, so there will be no validation; give a larger "
                "--data.val_split_fraction or a file of validation samples",
                stacklevel=2,
            )
        self.train_dataset = self._dataset(train, "training")
        self.test_dataset = self._dataset(val, "validation") if len(val) else None
        if self.preview and rank_and_world()[0] == 0:
            self.print_preview()

    def load_samples(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        """The training and the validation samples, all of them checked; the latter may be empty."""
        if self.json_path.is_file():
            splits = {"train": read_rows(self.json_path)}
        else:
            splits = {name: read_files(files) for name, files in find_splits(self.json_path).items()}
        for rows in splits.values():
            self.check(rows)
        if "val" in splits and self.val_split_fraction is not None:
            raise ValueError(
                f"{self.json_path} has validation samples of its own, so --data.val_split_fraction must not be given"
            )
        if "val" in splits:
            train, val = splits["train"], splits["val"]
        else:
            fraction = DEFAULT_FRACTION if self.val_split_fraction is None else self.val_split_fraction
            train, val = split_samples(splits["train"], fraction, self.seed)
        return (as_singles(train), as_singles(val)) if self.unpaired else (train, val)

    def check(self, rows: Rows) -> None:
        """Raise ValueError for the first row that is no preference, or not of the kind that the loss compares."""
        for n, row in enumerate(rows):
            kind = kind_of(row)
            if kind == "unpaired" and not self.unpaired:
                raise ValueError(
                    f"{rows.place(n)}: is a single answer with a label, and this loss compares pairs: use --loss kto, "
                    "or give rows with prompt, chosen and rejected"
                )
            (as_unpaired if kind == "unpaired" else as_preference)(row, rows.place(n))

    def _dataset(self, samples: Sequence[Mapping[str, Any]], name: str) -> PreferenceDataset:
        encoder = PreferenceEncoder(
            self.tokenizer, self.prompt_style, self.max_seq_length, self.too_long, self.vocab_size
        )
        folder = Path(self.cache_dir or cache_folder() / "preferences")
        dataset = PreferenceDataset(samples, encoder, folder, self.num_workers, self.reference_key)
        report_faults(dataset, self.max_seq_length, name)
        return dataset

    def train_dataloader(self) -> ExampleLoader:
        self.setup()
        return self._loader(self.train_dataset, shuffle=True)

    def val_dataloader(self) -> ExampleLoader | None:
        self.setup()
        return None if self.test_dataset is None else self._loader(self.test_dataset, shuffle=False)

    def _loader(self, dataset: PreferenceDataset, shuffle: bool) -> ExampleLoader:
        by_length = self.group_by_length and shuffle
        return ExampleLoader(dataset, self.batch_size, seed=self.seed, shuffle=shuffle, group_by_length=by_length)

    def example_prompt(self, sample: Mapping[str, Any]) -> str:
        """The text that a model continues with an answer."""
        one = as_unpaired(sample) if kind_of(sample) == "unpaired" else as_preference(sample)
        answer = {"role": "assistant", "content": ""}
        return prompt_text(Conversation([*one.prompt, answer], one.tools), self.prompt_style)

    def print_preview(self) -> None:
        """Print the first samples, with what is compared."""
        for n in range(min(self.preview, len(self.train_dataset))):
            example = self.train_dataset[n]
            for prefix in ("chosen_", "rejected_") if "chosen_input_ids" in example else ("",):
                ids, labels = example[f"{prefix}input_ids"], example[f"{prefix}labels"]
                what = prefix.rstrip("_") or ("liked" if example["desirable"] else "not liked")
                print(f"--- sample {n + 1}, {what}: {len(ids)} tokens, {int((labels != IGNORE_INDEX).sum())} compared")
                print(marked_text(self.tokenizer, ids, labels != IGNORE_INDEX))


def as_singles(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The samples as single answers. The two of a pair stand far apart: KTO swaps the answers of neighbours."""
    pairs = [sample for sample in samples if kind_of(sample) != "unpaired"]
    singles = [sample for sample in samples if kind_of(sample) == "unpaired"]
    for n, row in enumerate(pairs):
        pair, other = as_preference(row), as_preference(pairs[(n + len(pairs) // 2) % len(pairs)])
        for one, answer, label in ((pair, pair.chosen, True), (other, other.rejected, False)):
            singles.append({"prompt": one.prompt, "completion": answer, "label": label, "tools": one.tools})
    return singles


def report_faults(dataset: PreferenceDataset, limit: int, name: str) -> None:
    """Say how many samples were cut, left out, or have equal answers.

    Raises:
        ValueError: No sample is left.
    """
    examples, n = dataset.examples, len(dataset.data)
    if not len(examples):
        raise ValueError(
            f"of {n} {name} samples none is left: their prompts or answers are longer than {limit} tokens; raise "
            "--train.max_seq_length, or set --data.too_long cut"
        )
    n_cut, n_equal = (int(examples.totals.get(f"faults/{fault}", 0)) for fault in ("cut", "equal"))
    found = [f"{n_cut} cut to {limit} tokens"] if n_cut else []
    if examples.n_left_out:
        found.append(f"{examples.n_left_out} left out, as no answer or not all of it fits into {limit} tokens")
    if n_equal:
        found.append(f"{n_equal} have equal answers, which teach nothing")
    if found and rank_and_world()[0] == 0:
        warnings.warn(f"of {n:,} {name} samples: {'; '.join(found)}", stacklevel=2)
