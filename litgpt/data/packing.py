"""Several documents in one row: which go together, and how they are joined without seeing each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litgpt.data.sampler import Permutation

IGNORE_INDEX = -100


def best_fit_decreasing(counts: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Put items into as few rows as best-fit-decreasing finds, whole lengths at a time.

    The longest item comes first, and each goes into the row with the least room that still holds it. Then all rows of
    one room take items of the same length in turn, and a row that took one is the best for the next: so they are
    filled in bulk, and a million items take no longer than their lengths differ.

    Args:
        counts: `(capacity + 1,)` how many items there are of each length; none of length 0.
        capacity: Length of a row.

    Returns:
        The row of each item, the items sorted from the longest to the shortest, and the number of rows.
    """
    rows_with_room: dict[int, list[np.ndarray]] = {}
    rooms = 0  # bit r is set where there is a row with room r
    placed: list[np.ndarray] = []
    n_rows = 0
    for length in range(capacity, 0, -1):
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                rows = rows_with_room[room].pop()
                if not rows_with_room[room]:
                    rooms ^= 1 << room
            else:
                room = capacity
                rows = np.arange(n_rows, n_rows - (-left // (capacity // length)))
                n_rows += len(rows)
            each = room // length
            n_full = min(len(rows), left // each)
            left -= n_full * each
            placed.append(np.repeat(rows[:n_full], each))
            after = [(rows[:n_full], room - each * length)]
            if n_full < len(rows):
                placed.append(np.repeat(rows[n_full : n_full + 1], left))
                after += [(rows[n_full : n_full + 1], room - left * length), (rows[n_full + 1 :], room)]
                left = 0
            for some, room in after:
                if len(some) and room:
                    rows_with_room.setdefault(room, []).append(some)
                    rooms |= 1 << room
    return np.concatenate(placed) if placed else np.empty(0, np.int64), n_rows


class PackedRows:
    """Rows of documents, at most `row_tokens` long; each epoch has other documents in them and another order.

    The lengths alone decide how many rows there are, so an epoch always has the same number. Among documents of one
    length chance decides which of them goes where.

    Args:
        lengths: Tokens of each document `(n,)`; of a longer one than `row_tokens` only the start counts.
        row_tokens: Tokens of a row at most.
    """

    def __init__(self, lengths: np.ndarray, row_tokens: int) -> None:
        if row_tokens < 1:
            raise ValueError(f"a row of {row_tokens} tokens holds no document; set --train.max_seq_length to 1 or more")
        self.row_tokens = row_tokens
        self.lengths = np.clip(lengths, 1, row_tokens)
        rows, self.n_rows = best_fit_decreasing(np.bincount(self.lengths, minlength=row_tokens + 1), row_tokens)
        self._slots = np.argsort(rows, kind="stable")  # places of the sorted documents, row by row
        self._ends = np.cumsum(np.bincount(rows, minlength=self.n_rows))
        self._epochs: dict[tuple[int, int], tuple[np.ndarray, Permutation]] = {}

    def __len__(self) -> int:
        return self.n_rows

    @property
    def fill(self) -> float:
        """Share of the tokens of all rows that are taken."""
        return float(self.lengths.sum()) / max(1, self.n_rows * self.row_tokens)

    def documents(self, row: int, seed: int, epoch: int) -> np.ndarray:
        """Numbers of the documents in `row` of `epoch`."""
        if (seed, epoch) not in self._epochs:
            while len(self._epochs) >= 2:  # a batch may reach into the next epoch
                del self._epochs[next(iter(self._epochs))]
            shuffled = Permutation(len(self.lengths), seed, epoch)(np.arange(len(self.lengths)))
            longest_first = np.argsort((self.row_tokens - self.lengths)[shuffled], kind="stable")
            order = Permutation(self.n_rows, seed, epoch, 1)
            self._epochs[seed, epoch] = shuffled[longest_first][self._slots], order
        documents, order = self._epochs[seed, epoch]
        row = int(order(np.array([row]))[0])
        return documents[self._ends[row - 1] if row else 0 : self._ends[row]]


def concatenate(examples: Sequence[Mapping[str, Any]], max_tokens: int | None = None) -> dict[str, Any]:
    """One example out of several documents, whose tokens neither see each other nor predict the next one's first.

    Args:
        examples: Each `{"input_ids": (t,)}` with `labels` `(t,)` aligned to them (default: the ids), further tensors
            `(t,)`, and counts: numbers, or dicts of them.
        max_tokens: What an example has beyond so many tokens is left out.

    Returns:
        `input_ids` and `labels` `(n,)`, `segment_ids` `(n,)` that count the documents from 0, the other tensors joined
        and the counts summed. From `segment_ids` the model works out the positions in each document.
    """
    parts = []
    for number, example in enumerate(examples):
        ids = example["input_ids"][:max_tokens]
        labels = example.get("labels", ids)[:max_tokens].clone()
        labels[:1] = IGNORE_INDEX  # the document before must not predict it
        others = {k: v[:max_tokens] if isinstance(v, Tensor) else v for k, v in example.items() if k != "segment_ids"}
        parts.append({**others, "input_ids": ids, "labels": labels, "segment_ids": torch.full_like(ids, number)})
    return {key: join([part[key] for part in parts]) for key in parts[0]}


def join(values: Sequence[Any]) -> Any:
    """Tensors one behind the other, numbers added up, dicts entry by entry."""
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    if isinstance(values[0], Mapping):
        return {key: join([value[key] for value in values]) for key in values[0]}
    return sum(values)


def as_one_row(examples: Sequence[Mapping[str, Any]], length: int | None = None, pad_id: int = 0) -> dict[str, Any]:
    """The batch `(1, n)` of one packed example; counts become `(1, 1)`.

    Args:
        examples: A single one, of `concatenate`.
        length: Pad the end up to so many tokens, where batches must be of one shape; the padding is a document more.
        pad_id: Token of the padding.
    """
    (example,) = examples
    missing = max(0, (length or 0) - len(example["input_ids"]))
    fill = {"input_ids": pad_id, "labels": IGNORE_INDEX, "segment_ids": int(example["segment_ids"].max()) + 1}

    def row(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: row(name, inner) for name, inner in value.items()}
        if not isinstance(value, Tensor):
            return torch.tensor([[value]])
        return torch.nn.functional.pad(value, (0, missing), value=fill.get(key, 0)).unsqueeze(0)  # (1, n)

    return {key: row(key, value) for key, value in example.items()}
