"""Which sample comes when: shuffling, mixing and sharing among ranks by arithmetic.

Training reads one endless stream of **global samples** 0, 1, 2, ...: epoch e is the samples e*n to (e+1)*n, in an order
of its own. In each step the next `batch_size * world` of them go round the ranks, so the number of samples consumed is
the whole state: a resumed run goes on with the next sample on any number of ranks, and no list is ever replayed or kept
in memory. A batch may reach over the end of an epoch, so that nothing is dropped and all ranks take the same steps.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from litgpt.data.base import rank_and_world
from litgpt.data.shards import TokenShards

N_ROUNDS = 8


class Permutation:
    """A pseudo-random permutation of `range(n)` that gives any of its values without computing the others.

    A Feistel network permutes the next power of four; values outside of the range are sent through it again, which must
    lead back inside (cycle walking, doi.org/10.1007/3-540-45760-7_9).

    Args:
        n: Length, at least 1.
        key: Numbers that choose the permutation.
    """

    def __init__(self, n: int, *key: int) -> None:
        self.n = n
        self.half = max(1, ((n - 1).bit_length() + 1) // 2)
        self.keys = np.frombuffer(hashlib.blake2b(repr((n, *key)).encode()).digest(), np.uint64)
        assert len(self.keys) == N_ROUNDS

    def _network(self, x: np.ndarray) -> np.ndarray:
        half, low = np.uint64(self.half), np.uint64((1 << self.half) - 1)
        left, right = x >> half, x & low
        for key in self.keys:
            mixed = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's finaliser; wraps around on purpose
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & low)
        return (left << half) | right

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Values at `index`: `(B,)` int64 in and out."""
        x = self._network(index.astype(np.uint64))
        while (outside := x >= self.n).any():
            x[outside] = self._network(x[outside])
        return x.astype(np.int64)


class Stream(Protocol):
    """An endless sequence of samples with random access; its length is that of an epoch."""

    def __len__(self) -> int: ...

    def read(self, samples: np.ndarray) -> Any:
        """What a batch is made of, for the global samples `(B,)`; of tokens `(B, T + 1)` int64."""


class WindowStream:
    """Windows of `max_seq_length + 1` tokens over the shards, neighbours sharing one token.

    So each token is predicted once per epoch. The tokens that fill no window at the end, fewer than one window, take
    turns: each epoch begins at another offset.

    Args:
        shards: The tokens.
        max_seq_length: T, the number of tokens that a window predicts.
        seed: Decides the order in each epoch; None reads the windows in the order of the text.

    Raises:
        ValueError: There are too few tokens for one window.
    """

    def __init__(self, shards: TokenShards, max_seq_length: int, seed: int | None = None) -> None:
        self.shards, self.max_seq_length, self.seed = shards, max_seq_length, seed
        self.n_windows, self.spare = divmod(len(shards) - 1, max_seq_length)
        if self.n_windows < 1:
            raise ValueError(
                f"{shards.folder} has {len(shards):,} tokens, too few for one sample of {max_seq_length:,} + 1: "
                f"supply more text or lower --train.max_seq_length to {max(1, (len(shards) - 1) // 2):,} or less"
            )

    def __len__(self) -> int:
        return self.n_windows

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """First token of each sample `(B,)` -> `(B,)`."""
        epochs, windows = np.divmod(samples, self.n_windows)
        if self.seed is None:
            return windows * self.max_seq_length
        starts = np.empty_like(windows)
        for epoch in np.unique(epochs).tolist():
            order, offset = epoch_order(self.n_windows, self.spare, self.seed, epoch)
            here = epochs == epoch
            starts[here] = order(windows[here]) * self.max_seq_length + offset
        return starts

    def read(self, samples: np.ndarray) -> Tensor:
        """Tokens of the global samples `(B,)`: `(B, T + 1)` int64."""
        return torch.from_numpy(self.shards.windows(self.starts(samples), self.max_seq_length + 1))


@lru_cache(maxsize=64)
def epoch_order(n_windows: int, spare: int, seed: int, epoch: int) -> tuple[Permutation, int]:
    """Order of the windows in an epoch, and the number of tokens (at most `spare`) that it leaves out at the start."""
    offset = Permutation(spare + 1, seed)(np.array([epoch % (spare + 1)]))[0]
    return Permutation(n_windows, seed, epoch), int(offset)


class MixedStream:
    """Several streams in fixed proportions, evenly interleaved.

    An epoch ends where the first of the streams has been read once. Each stream goes on by itself, so none of its
    samples comes again before all of them have come.

    Args:
        streams: What is mixed.
        weights: Share of each in the samples; exact to a millionth.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float]) -> None:
        self.streams = list(streams)
        total = sum(weights)
        self.weights = [round(weight / total * 1_000_000) for weight in weights]

    def __len__(self) -> int:
        total = sum(self.weights)
        return max(1, min(len(s) * total // w for s, w in zip(self.streams, self.weights) if w))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stream of each global sample, and the sample within that stream: `(B,)` -> two of `(B,)`."""
        which, index = np.full_like(samples, len(self.streams) - 1), samples.copy()
        left, rest = np.ones_like(samples, bool), sum(self.weights)
        for number, weight in enumerate(self.weights[:-1]):
            # of the samples that are left this stream takes each at which floor(i * weight / rest) makes a step
            before, after = taken(index, weight, rest), taken(index + 1, weight, rest)
            here = left & (after > before)
            which[here], left = number, left & ~here
            index = np.where(here, before, np.where(left, index - before, index))
            rest -= weight
        return which, index

    def read(self, samples: np.ndarray) -> Tensor:
        """Tokens of the global samples `(B,)`: `(B, T + 1)` int64."""
        which, index = self.locate(samples)
        rows = {}
        for number in np.unique(which).tolist():
            here = np.flatnonzero(which == number)
            rows |= zip(here.tolist(), self.streams[number].read(index[here]))
        return torch.stack([rows[row] for row in range(len(samples))])


def taken(index: np.ndarray, weight: int, rest: int) -> np.ndarray:
    """`index * weight // rest`, written so that a large index does not overflow."""
    return index // rest * weight + index % rest * weight // rest


class Batches(Dataset):
    """Looks up whole batches, so that a loader's worker makes one tensor instead of a list of rows."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, sample: int) -> Any:
        return self.stream.read(np.array([sample]))[0]

    def __getitems__(self, samples: list[int]) -> Any:
        return self.stream.read(np.asarray(samples, np.int64))


class Schedule:
    """Global samples of each step of this rank: those of an endless stream, or of one pass in order.

    Args:
        n_samples: Samples in an epoch.
        batch_size: Samples per step and rank.
        endless: Whether training (see the head of this file) or validation uses it. The latter begins anew each time;
            its last batch may be smaller, and where the ranks do not come out even, some see one sample twice.
    """

    def __init__(self, n_samples: int, batch_size: int, endless: bool, rank: int, world: int) -> None:
        self.n_samples, self.batch_size, self.endless = n_samples, batch_size, endless
        self.rank, self.world = rank, world
        self.consumed = 0

    def __len__(self) -> int:
        return -(-self.n_samples // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        n, step = self.n_samples, self.batch_size * self.world
        if self.endless:
            position = self.consumed
            end = (position // n + 1) * n
            while position < end:
                yield list(range(position + self.rank, position + step, self.world))
                position += step
        else:
            end = -(-n // self.world) * self.world
            for position in range(0, end, step):
                yield [i % n for i in range(position + self.rank, min(position + step, end), self.world)]


class StreamLoader(DataLoader):
    """Batches of a stream for this rank. One iteration is the rest of the current epoch.

    Build it when the process group exists. It shares the samples among the ranks itself: do not let Fabric replace the
    sampler (`use_distributed_sampler=False`).

    Args:
        stream: The samples.
        batch_size: Samples per batch on this rank.
        endless: False for validation: always from the first sample to the last.
        rank: Number of this rank among those that get different samples; from torch.distributed by default.
        world: How many of them there are.
        num_workers: Processes that read; reading from memory-mapped files is fast enough without.
        collate_fn: Makes a batch of what the stream reads.
    """

    reads = "litgpt's streams"
    """Whose state it is, for the message when another one is loaded."""

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        endless: bool = True,
        rank: int | None = None,
        world: int | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
    ) -> None:
        here = rank_and_world()
        rank, world = here[0] if rank is None else rank, here[1] if world is None else world
        self.schedule = Schedule(len(stream), batch_size, endless, rank, world)
        super().__init__(
            Batches(stream),
            batch_sampler=self.schedule,
            collate_fn=collate_fn or as_it_is,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.schedule.consumed += self.schedule.batch_size * self.schedule.world  # workers may be further ahead
            yield batch

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next sample belongs to."""
        return self.schedule.consumed // self.schedule.n_samples

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`, unless the stream is within it already (resumed, or a batch reached into it)."""
        if epoch != self.epoch:
            self.schedule.consumed = epoch * self.schedule.n_samples

    def state_dict(self) -> dict[str, int]:
        """The global samples consumed, and what they mean."""
        return {"epoch": self.epoch, "samples": self.schedule.consumed, "samples_per_epoch": self.schedule.n_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the samples that `state` has consumed, on whatever number of ranks."""
        if not isinstance(state, dict) or "samples" not in state:
            raise ValueError(f"the checkpoint's data state is not one of {self.reads}; resume with the same --data")
        if (n := state.get("samples_per_epoch")) != self.schedule.n_samples:
            warnings.warn(
                f"the data has {self.schedule.n_samples} samples per epoch, {n} when the checkpoint was written: "
                "the resumed run sees other samples than an uninterrupted one",
                stacklevel=2,
            )
        self.schedule.consumed = state["samples"]


class TokenLoader(StreamLoader):
    """Batches `(B, T + 1)` int64 of token shards."""

    reads = "litgpt's token shards"


def as_it_is(batch: Any) -> Any:
    """Batches come complete from `Batches`."""
    return batch
