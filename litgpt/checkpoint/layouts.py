"""Lazy tensors out of lazy tensors: put together, in another order, out of a stack, out of FP8. Nothing is read."""

import re
from collections.abc import Iterator, Mapping
from functools import partial, reduce
from math import prod

import torch
from torch import Tensor

from litgpt.checkpoint.lazy import PIECE_BYTES, LazyTensor, gather

FP8_BLOCK = 128
"""Rows and columns of a block that shares one scale."""

_SCALE = "_scale_inv"
_STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(\.weight)?")


def join(tensors: list[LazyTensor]) -> LazyTensor:
    """Tensors that differ in their number of rows only, one below the other."""
    if len(tensors) == 1:
        return tensors[0]
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))

    def pieces() -> Iterator[Tensor]:
        return (piece for tensor in tensors for piece in tensor.to(dtype).iter_pieces())

    return LazyTensor(shape, dtype, read=lambda: gather(pieces(), shape, dtype), pieces=pieces)


def order_heads(tensor: LazyTensor, n_head: int, n_groups: int, grouped: bool) -> LazyTensor:
    """The rows of a fused query, key and value projection in another order.

    Args:
        tensor: `((nh + 2 G) * hs, ..)`.
        n_head: nh, of the queries.
        n_groups: G, number of heads of the keys and of the values.
        grouped: The order wanted: `q..q k v` of each group in turn, else all queries, all keys, all values.
    """
    if n_groups == 1:  # both orders are the same
        return tensor
    in_groups = torch.arange(n_head + 2 * n_groups).view(n_groups, -1)  # (G, nh / G + 2)
    order = torch.cat((in_groups[:, :-2].flatten(), in_groups[:, -2], in_groups[:, -1]))  # (nh + 2 G,)
    order = order.argsort() if grouped else order

    def read() -> Tensor:
        return tensor.read().unflatten(0, (len(order), -1))[order].flatten(0, 1)

    return LazyTensor(tensor.shape, tensor.dtype, read)


def same(tensor: LazyTensor, other: LazyTensor, complaint: str) -> LazyTensor:
    """`tensor`; reading it raises a ValueError with `complaint` if the values of `other` are not the same."""

    def read() -> Tensor:
        values = tensor.read()
        if not torch.equal(values, other.to(tensor.dtype).read()):
            raise ValueError(complaint)
        return values

    return LazyTensor(tensor.shape, tensor.dtype, read)


def unstack_experts(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Experts that are stored as one tensor `(E, ..)` a layer, one by one; what is not stacked stays as it is.

    Gate and up projection lie in one stack, `(E, 2 I, C)`.
    """
    single: dict[str, LazyTensor] = {}
    for name, stack in tensors.items():
        match = _STACK.fullmatch(name) if len(stack.shape) == 3 else None
        if match is None:
            single[name] = stack
            continue
        n_experts, n_rows, n_columns = stack.shape
        parts = ["gate_proj", "up_proj"] if match[2] == "gate_up_proj" else ["down_proj"]
        shape = (n_rows // len(parts), n_columns)
        for i in range(n_experts * len(parts)):
            expert, part = divmod(i, len(parts))
            alone = f"{match[1]}.{expert}.{parts[part]}.weight"
            if alone in tensors:
                raise ValueError(
                    f"`{alone}` is there twice, also in the stack `{name}`; delete one of the weight files"
                )
            single[alone] = stack.span(i * prod(shape), shape)
    return single


def dequantize_fp8(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Weights in FP8 times their `weight_scale_inv`, a number for each 128 x 128 block, as bfloat16; the rest as it is.

    Raises:
        ValueError: The scales of a weight are missing or do not fit it.
    """
    plain: dict[str, LazyTensor] = {}
    for name, weight in tensors.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors:
            continue
        if weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            plain[name] = weight
            continue
        scale, blocks = tensors.get(name + _SCALE), tuple(-(-size // FP8_BLOCK) for size in weight.shape)
        if scale is None or len(blocks) != 2 or scale.shape != blocks:
            found = "missing" if scale is None else f"of shape {scale.shape}"
            raise ValueError(
                f"`{name}` {weight.shape} is in FP8 and its scales `{name}{_SCALE}` are {found}; only one for each "
                f"block of {FP8_BLOCK} x {FP8_BLOCK}, here {blocks}, can be read"
            )
        pieces = partial(_dequantized_pieces, weight, scale)
        read = partial(_read_pieces, pieces, weight.shape)
        plain[name] = LazyTensor(weight.shape, torch.bfloat16, read, pieces=pieces)
    return plain


def _read_pieces(pieces: partial, shape: tuple[int, ...]) -> Tensor:
    return gather(pieces(), shape, torch.bfloat16)


def _dequantized_pieces(weight: LazyTensor, scale: LazyTensor) -> Iterator[Tensor]:
    n_rows, n_columns = weight.shape
    scales = scale.read().float().repeat_interleave(FP8_BLOCK, dim=1)[:, :n_columns]  # (rows / 128, columns)
    step = FP8_BLOCK * max(1, PIECE_BYTES // (4 * FP8_BLOCK * n_columns))
    for begin in range(0, n_rows, step):
        n = min(step, n_rows - begin)
        band = weight.span(begin * n_columns, (n, n_columns)).read().float()  # (n, columns)
        factors = scales[begin // FP8_BLOCK :].repeat_interleave(FP8_BLOCK, dim=0)[:n]
        yield (band * factors).to(torch.bfloat16).flatten()
