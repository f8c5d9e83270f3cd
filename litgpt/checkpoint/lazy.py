"""A tensor that is still on disk, or still to be computed: the currency between weight files and weight maps."""

import ctypes
import functools
import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE_BYTES = 1 << 25
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
            if self.pieces is None:
                return self.read().to(dtype)
            return gather(pieces(), self.shape, dtype)

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


def gather(pieces: Iterator[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One tensor out of flat pieces."""
    whole = torch.empty(shape, dtype=dtype)
    flat, begin = whole.view(-1), 0
    for piece in pieces:
        flat[begin : begin + piece.numel()] = piece
        begin += piece.numel()
    assert begin == flat.numel()
    return whole


def mapped_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Copies of the slices of a contiguous tensor in a mapped file, whose pages are given back after each.

    The mapping must not be handed to anybody else: what was changed in it would be lost.
    """
    for piece in _slices(tensor):
        yield piece.clone()
        release_pages(piece)


def release_pages(tensor: Tensor) -> None:
    """Tell the system that the pages of a mapped file below `tensor` are not needed. A hint, never an error."""
    madvise, advice = _madvise(), getattr(mmap, "MADV_DONTNEED", None)
    if madvise is None or advice is None or not tensor.numel():
        return
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice))


@functools.cache
def _madvise() -> Callable | None:
    try:
        return ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None  # Windows


def _slices(tensor: Tensor) -> Iterator[Tensor]:
    flat, step = tensor.reshape(-1), max(1, PIECE_BYTES // tensor.element_size())
    for begin in range(0, flat.numel(), step):
        yield flat[begin : begin + step]
