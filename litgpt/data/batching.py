"""Batches of examples for finetuning: which come when, one by one, by similar length, or packed into rows.

As in `sampler.py`, training reads one endless stream of global samples, and their number is the whole state of a
loader. A sample is an example, or a packed row of several.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from litgpt.data.base import rank_and_world
from litgpt.data.packing import PackedRows, as_one_row, concatenate
from litgpt.data.sampler import Permutation, StreamLoader, epoch_order

BATCHES_SORTED_TOGETHER = 64
"""Examples of so many batches, drawn at random, are sorted by length: few enough that batches differ each epoch."""


class Order(Protocol):
    """Which examples the global samples of the endless stream are; its length is that of an epoch."""

    kind: str
    seed: int | None

    def __len__(self) -> int: ...

    def examples(self, sample: int) -> Sequence[int]:
        """Numbers of the examples of a global sample."""


class PlainOrder:
    """Each example by itself: shuffled, or without a seed as they stand."""

    kind = "plain"

    def __init__(self, n: int, seed: int | None) -> None:
        self.n, self.seed = n, seed

    def __len__(self) -> int:
        return self.n

    def examples(self, sample: int) -> Sequence[int]:
        epoch, place = divmod(sample, self.n)
        if self.seed is None:
            return [place]
        return epoch_order(self.n, 0, self.seed, epoch)[0](np.array([place])).tolist()


class GroupedOrder:
    """Shuffled so that the samples of a step are of similar length; the order of the steps is random.

    Args:
        lengths: Tokens of each example `(n,)`.
        group: Samples that a step takes on all ranks. On other numbers of ranks the order is right too, with a little
            more padding.
        seed: Decides the order of each epoch.
    """

    kind = "grouped"

    def __init__(self, lengths: np.ndarray, group: int, seed: int) -> None:
        self.lengths, self.group, self.seed = np.asarray(lengths), group, seed
        self._epochs: dict[tuple[int, int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def examples(self, sample: int) -> Sequence[int]:
        epoch, place = divmod(sample, len(self))
        key = (self.seed, self.group, epoch)
        if key not in self._epochs:
            while len(self._epochs) >= 2:  # a batch may reach into the next epoch
                del self._epochs[next(iter(self._epochs))]
            self._epochs[key] = self._order(epoch)
        return [int(self._epochs[key][place])]

    def _order(self, epoch: int) -> np.ndarray:
        """Examples at the places of an epoch `(n,)`. Its steps begin where the last one of the epoch before ends."""
        n, group = len(self), self.group
        head = min(n, -epoch * n % group)  # what completes the step that the epoch before has begun
        n_groups = (n - head) // group
        order = Permutation(n, self.seed, epoch)(np.arange(n))
        middle = order[head : head + n_groups * group]
        if n_groups:
            batch = np.arange(len(middle)) // (group * BATCHES_SORTED_TOGETHER)
            groups = middle[np.lexsort((self.lengths[middle], batch))].reshape(n_groups, group)
            middle[:] = groups[Permutation(n_groups, self.seed, epoch, 1)(np.arange(n_groups))].reshape(-1)
        return order


class PackedOrder:
    """Rows of several examples, see `PackedRows`."""

    kind = "packed"

    def __init__(self, lengths: np.ndarray, row_tokens: int, seed: int) -> None:
        self.rows, self.seed = PackedRows(np.asarray(lengths), row_tokens), seed

    def __len__(self) -> int:
        return len(self.rows)

    def examples(self, sample: int) -> Sequence[int]:
        epoch, row = divmod(sample, len(self))
        return self.rows.documents(row, self.seed, epoch).tolist()


class ExampleStream:
    """The examples in their order; packed ones are joined to a single example for each batch."""

    def __init__(self, examples: Sequence[Mapping[str, Any]], order: Order) -> None:
        self.source, self.order = examples, order

    def __len__(self) -> int:
        return len(self.order)

    def read(self, samples: np.ndarray) -> list[Mapping[str, Any]]:
        """Examples of the global samples `(B,)`."""
        numbers = [number for sample in samples.tolist() for number in self.order.examples(sample)]
        examples = [self.source[number] for number in numbers]
        return [concatenate(examples, self.order.rows.row_tokens)] if self.order.kind == "packed" else examples


class ExampleLoader(StreamLoader):
    """Batches of examples for this rank, resumable exactly on any number of ranks. Iterate for the rest of an epoch.

    Training (`shuffle=True`) sees every example once per epoch; the last batch of an epoch takes what it lacks from the
    next. Validation sees the same batches in the same order each time. Build it when the process group exists.

    Args:
        examples: Each a dict of 1-D tensors with `input_ids`, as `TokenizedExamples` has them.
        batch_size: Examples per batch and rank; with `pack_into` rows.
        collate_fn: Makes a batch of a list of examples. When packing, the list is one example: all rows of the batch,
            joined, with `segment_ids`. Default: the list as it is, or when packing the dict of tensors `(1, n)`.
        seed: Decides the order.
        shuffle: False for validation.
        group_by_length: Put examples of similar length into a batch.
        pack_into: Tokens of a row into which examples are packed; None does not pack.
        rank: Number of this rank among those that get different samples; from torch.distributed by default.
        world: How many of them there are.
        num_workers: Processes that read and collate.

    Raises:
        ValueError: There is no example.
    """

    reads = "litgpt's finetuning data"

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        batch_size: int,
        collate_fn: Callable[[list[Mapping[str, Any]]], Any] | None = None,
        seed: int = 42,
        shuffle: bool = True,
        group_by_length: bool = False,
        pack_into: int | None = None,
        rank: int | None = None,
        world: int | None = None,
        num_workers: int = 0,
    ) -> None:
        if not len(examples):
            raise ValueError("the data has no example; is the file empty, or the validation split 0 or 1?")
        world = rank_and_world()[1] if world is None else world
        self.order = self._order(examples, batch_size * world, seed, shuffle, group_by_length, pack_into)
        collate_fn = collate_fn or (as_one_row if pack_into else None)
        stream = ExampleStream(examples, self.order)
        super().__init__(stream, batch_size, shuffle, rank, world, num_workers, collate_fn)

    @staticmethod
    def _order(
        examples: Sequence[Mapping[str, Any]], group: int, seed: int, shuffle: bool, by_length: bool, row: int | None
    ) -> Order:
        fixed = seed if shuffle else 0  # validation has the same batches whatever the seed of the run
        if row is not None:
            return PackedOrder(lengths_of(examples), row, fixed)
        if by_length:
            return GroupedOrder(lengths_of(examples), group, fixed)
        return PlainOrder(len(examples), seed if shuffle else None)

    def state_dict(self) -> dict[str, Any]:
        """The global samples consumed, and what they mean."""
        order = {"kind": self.order.kind, "seed": self.order.seed, "group": getattr(self.order, "group", None)}
        return {**super().state_dict(), "order": order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the samples that `state` has consumed, on whatever number of ranks, in the order it had.

        Raises:
            ValueError: The samples are others: packed then and not now, or the like.
        """
        order = (state.get("order") if isinstance(state, dict) else None) or {}
        if order and order["kind"] != self.order.kind:
            raise ValueError(
                f"the checkpoint's batches were {order['kind']}, now they are {self.order.kind}: resume with the same "
                "--data.pack and --data.group_by_length"
            )
        super().load_state_dict(state)
        self.order.seed = order.get("seed", self.order.seed)
        if order.get("group") is not None:
            self.order.group = order["group"]


def lengths_of(examples: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Tokens of each example `(n,)` int64; not read where the examples, or what they are a subset of, know them."""
    if (lengths := getattr(examples, "lengths", None)) is not None:
        return np.asarray(lengths)
    if hasattr(examples, "indices") and hasattr(examples, "dataset"):  # torch.utils.data.Subset
        return lengths_of(examples.dataset)[np.asarray(examples.indices, np.int64)]
    return np.fromiter((len(examples[i]["input_ids"]) for i in range(len(examples))), np.int64, len(examples))
