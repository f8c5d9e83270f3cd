"""A tensor that is still on disk, or still to be computed: the currency between weight files and weight maps."""

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from litgpt.checkpoint.folders import damaged

PIECE_BYTES = 1 << 22
"""Size of the pieces in which large tensors are copied, cast and written."""


@dataclass(frozen=True)
class LazyTensor:
    """Shape and dtype of a tensor, and how to get at its values. Nothing is read before one of the functions is called.

    Two names of one tensor in a file have the same `LazyTensor` object; the writers then store it once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Gives the values in memory of their own, contiguous; no pages of a mapped file stay behind."""
    view: Callable[[], Tensor] | None = None
    """Gives a view of the privately mapped file, without copying. None: the values have to be computed."""
    pieces: Callable[[], Iterator[Tensor]] | None = None
    """Gives the values flat, in order, as pieces of about `PIECE_BYTES`; what they lie in is reused for the next one.
    None: only the whole can be had."""
    cut: Callable[[int, tuple[int, ...]], "LazyTensor"] | None = None
    """Does what `span` promises, without reading the rest. None: `span` takes the whole."""

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """Wrap a tensor that is in memory already; `view` gives the tensor itself."""
        tensor = tensor.detach()
        return cls(
            tuple(tensor.shape),
            tensor.dtype,
            read=lambda: tensor.clone(memory_format=torch.contiguous_format),
            view=lambda: tensor,
            pieces=functools.partial(_slices, tensor) if tensor.is_contiguous() else None,
        )

    @property
    def n_bytes(self) -> int:
        """Bytes of the values, packed."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same values in another dtype, cast while they are read."""
        if dtype == self.dtype:
            return self

        def pieces() -> Iterator[Tensor]:
            return (piece.to(dtype) for piece in self.iter_pieces())

        def read() -> Tensor:
            return gather(self.iter_pieces(), self.shape, dtype)

        return LazyTensor(self.shape, dtype, read, pieces=pieces if self.pieces else None)

    def span(self, begin: int, shape: tuple[int, ...]) -> "LazyTensor":
        """The values from the flat index `begin` on, as a tensor of `shape`."""
        if self.cut is not None:
            return self.cut(begin, shape)
        whole, end = self.view or self.read, begin + math.prod(shape)

        def view() -> Tensor:
            return whole().reshape(-1)[begin:end].view(shape)

        return LazyTensor(shape, self.dtype, read=lambda: view().clone(), view=view if self.view else None)

    def iter_pieces(self) -> Iterator[Tensor]:
        """The values flat and in order, in pieces; in one piece where it cannot be done better."""
        if self.pieces is not None:
            yield from self.pieces()
        else:
            yield self.read().reshape(-1)


def cast_all(tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> dict[str, LazyTensor]:
    """All floating point tensors in another dtype; names of one tensor still have one object."""
    cast = {id(t): t.to(dtype) if t.dtype.is_floating_point else t for t in tensors.values()}
    return {name: cast[id(tensor)] for name, tensor in tensors.items()}


def gather(pieces: Iterator[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One tensor out of flat pieces, which are cast on the way."""
    whole = torch.empty(shape, dtype=dtype)
    flat, begin = whole.view(-1), 0
    for piece in pieces:
        flat[begin : begin + piece.numel()] = piece
        begin += piece.numel()
    assert begin == flat.numel()
    return whole


class OpenFile:
    """A file that stays the one it was when it was opened, also when another takes its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def fill(self, tensor: Tensor, begin: int) -> None:
        """Read the values of a contiguous tensor from the byte `begin` on."""
        if not tensor.numel():
            return
        rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        while len(rest):
            n_read = self._read_into(rest, begin)
            if not n_read:
                raise damaged(self.path, "it became shorter while it was read")
            rest, begin = rest[n_read:], begin + n_read

    def _read_into(self, buffer: memoryview, begin: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, [buffer], begin)
        os.lseek(self.descriptor, begin, os.SEEK_SET)
        data = os.read(self.descriptor, min(len(buffer), PIECE_BYTES))
        buffer[: len(data)] = data
        return len(data)


def on_disk(
    file: OpenFile, shape: tuple[int, ...], dtype: torch.dtype, begin: int, view: Callable[[], Tensor] | None
) -> LazyTensor:
    """The tensor whose values stand packed in a file, from the byte `begin` on.

    Reading goes through the file system, not through the mapping that the views share, so that no pages of it stay.
    """

    def read() -> Tensor:
        whole = torch.empty(shape, dtype=dtype)
        file.fill(whole, begin)
        return whole

    def pieces() -> Iterator[Tensor]:
        n_values, step = math.prod(shape), max(1, PIECE_BYTES // dtype.itemsize)
        buffer = torch.empty(min(step, n_values), dtype=dtype)
        for done in range(0, n_values, step):
            piece = buffer[: min(step, n_values - done)]
            file.fill(piece, begin + done * dtype.itemsize)
            yield piece

    def cut(first: int, part: tuple[int, ...]) -> LazyTensor:
        span = slice(first, first + math.prod(part))
        return on_disk(
            file, part, dtype, begin + first * dtype.itemsize, view and (lambda: view().reshape(-1)[span].view(part))
        )

    return LazyTensor(shape, dtype, read, view, pieces, cut)


def _slices(tensor: Tensor) -> Iterator[Tensor]:
    flat, step = tensor.reshape(-1), max(1, PIECE_BYTES // tensor.element_size())
    for begin in range(0, flat.numel(), step):
        yield flat[begin : begin + step]
