"""Linear layers in 4 or 8 bits: NF4 and FP4 (arXiv 2305.14314) through bitsandbytes, and int8 (arXiv 2208.07339).

The linear layers of a model's blocks are quantised; embedding, norms, routers and head stay as they are. The weights
are frozen, but gradients pass through them, so that LoRA and adapters learn around them on a CPU as on a GPU.
"""

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.checkpoint.lazy import LazyTensor
from litgpt.checkpoint.loading import check_fit, open_model_weights
from litgpt.checkpoint.tensors import open_weights
from litgpt.config import Config
from litgpt.model import LLaMAMoE

MODES = ("bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8", "bnb.int8-training")
PRECISIONS = ("bf16-true", "16-true", "32-true")
BLOCK_SIZE = 64  # weights that share a scale in 4 bits; with -dq 256 scales share one of their own
FEW_ROWS = 8  # inputs up to which the CPU's own int8 product is the faster one


def check_mode(mode: str, precision: str | None = None, is_training: bool | None = None) -> None:
    """Raises a `ValueError` for an unknown mode, or one that does not go with the precision or with (no) training."""
    allowed = [m for m in MODES if is_training is None or m != ("bnb.int8" if is_training else "bnb.int8-training")]
    if mode not in allowed:
        raise ValueError(f"quantize {mode!r} is not known here: choose {', '.join(allowed)}")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(
            f"quantize {mode} does not go with precision {precision}, whose weights are in another dtype than the "
            f"computation: choose {', '.join(PRECISIONS)}"
        )


def load_bitsandbytes() -> ModuleType:
    """The package; an ImportError says how to get it."""
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they remark on every import and every int8 product
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            f"quantisation needs bitsandbytes, which cannot be imported ({error}): pip install 'litgpt[quant]'"
        ) from None
    return bitsandbytes


class QuantizedLinear(nn.Linear):
    """A frozen linear layer of which only the quantised weight is kept; a bias stays as it is.

    Reading `weight` gives it in floating point, made anew each time; loading or setting one quantises it.
    """

    packed: Tensor
    absmax: Tensor

    def __init__(self, linear: nn.Linear, mode: str, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.mode, self.compute_dtype = mode, compute_dtype
        self.register_parameter("bias", linear.bias)
        self.quantize(linear.weight)

    @property
    def weight(self) -> Tensor:
        """The weight `(out, in)` as the layer computes with it."""
        return self.dequantize(self.compute_dtype)

    def quantize(self, weight: Tensor) -> None:
        """Takes over a new weight `(out, in)`."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight `(out, in)` in `dtype`."""
        raise NotImplementedError

    def multiply(self, x: Tensor) -> Tensor:
        """`x W^T` for `x` `(N, in)` where no gradient is wanted."""
        return F.linear(x, self.dequantize(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`(.., in)` to `(.., out)`."""
        shape, dtype = x.shape, x.dtype
        x = x.to(self.compute_dtype).reshape(-1, self.in_features)  # (N, in)
        with torch.autocast(x.device.type, enabled=False):
            y = QuantizedProduct.apply(x, self) if x.requires_grad and torch.is_grad_enabled() else self.multiply(x)
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.to(dtype).view(*shape[:-1], self.out_features)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and param is not None:
            self.quantize(param)
        else:
            super().register_parameter(name, param)

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        """Moves the layer; what is quantised, and its scales, keep their dtypes."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        self._buffers.update({name: tensor.to(self._buffers[name].device) for name, tensor in kept.items()})
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        if (weight := state_dict.pop(f"{prefix}weight", None)) is not None:
            if weight.shape != (self.out_features, self.in_features):
                found, wanted = tuple(weight.shape), (self.out_features, self.in_features)
                raise ValueError(f"{prefix}weight is {found} in the state dict, but {wanted} in the model")
            self.quantize(weight.to(self.packed.device))
            state_dict.update({f"{prefix}{name}": tensor for name, tensor in self._buffers.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"


class QuantizedProduct(torch.autograd.Function):
    """`x W^T` that keeps nothing but the quantised weight, which the backward pass makes floating point again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        """`x` `(N, in)` to `(N, out)`."""
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantize(grad.dtype), None


class Linear4bit(QuantizedLinear):
    """NF4 or FP4; with `-dq` the scales are quantised too. The numbers are those of bitsandbytes' `Linear4bit`."""

    def quantize(self, weight: Tensor) -> None:
        kind, _, nested = self.mode.removeprefix("bnb.").partition("-")
        how = dict(blocksize=BLOCK_SIZE, compress_statistics=bool(nested), quant_type=kind)
        weight = weight.detach().contiguous()
        weight = weight if weight.dtype in (torch.float16, torch.bfloat16) else weight.float()
        packed, state = load_bitsandbytes().functional.quantize_4bit(weight, **how)
        self._keep(packed=packed, absmax=state.absmax)
        if state.nested:
            self._keep(nested_absmax=state.state2.absmax, nested_offset=state.offset)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return load_bitsandbytes().functional.dequantize_4bit(self.packed, self._state(dtype))

    def multiply(self, x: Tensor) -> Tensor:
        return load_bitsandbytes().matmul_4bit(x, self.packed, self._state(x.dtype))

    def _state(self, dtype: torch.dtype) -> Any:
        kind, _, nested = self.mode.removeprefix("bnb.").partition("-")
        build = load_bitsandbytes().functional.QuantState
        shape, scales = torch.Size((self.out_features, self.in_features)), {}
        if nested:
            code = _scale_code(self.absmax.device)
            inner = build(self.nested_absmax, code=code, blocksize=256, dtype=torch.float32)
            scales = dict(offset=self.nested_offset, state2=inner)
        code = _weight_code(kind, self.packed.device)
        return build(self.absmax, shape, code, BLOCK_SIZE, quant_type=kind, dtype=dtype, **scales)


class Linear8bit(QuantizedLinear):
    """int8 with a scale for each output. On a GPU inputs are quantised too, but for outliers, when no gradient is
    wanted (LLM.int8)."""

    def quantize(self, weight: Tensor) -> None:
        weight = weight.detach().float()
        absmax = weight.abs().amax(dim=1)  # (out,)
        scale = torch.where(absmax > 0, 127 / absmax, 0).unsqueeze(1)
        self._keep(packed=(weight * scale).round().to(torch.int8), absmax=absmax)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.packed.to(dtype) * (self.absmax / 127).to(dtype).unsqueeze(1)

    def multiply(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda":
            return self._multiply_int8(x)
        # torch's kernel reads beyond the end of rows that are no multiple of 16 wide
        if x.device.type == "cpu" and len(x) <= FEW_ROWS and self.in_features % 64 == self.out_features % 64 == 0:
            return torch._weight_int8pack_mm(x, self.packed, (self.absmax / 127).to(x.dtype))
        return super().multiply(x)

    def _multiply_int8(self, x: Tensor) -> Tensor:
        bnb = load_bitsandbytes()
        state = bnb.MatmulLtState()
        state.CB, state.SCB, state.has_fp16_weights, state.is_training = self.packed, self.absmax, False, False
        return bnb.matmul(x, self.packed, state=state, threshold=6.0)  # inputs above it are outliers


@cache
def _weight_code(kind: str, device: torch.device) -> Tensor:
    return load_bitsandbytes().functional.get_4bit_type(kind, device=device)


@cache
def _scale_code(device: torch.device) -> Tensor:
    return load_bitsandbytes().functional.create_dynamic_map().to(device)


def quantizable_linears(model: nn.Module) -> list[str]:
    """Paths of the plain linear layers inside of repeated blocks, but for the routers of experts."""
    routers = {module.gate for module in model.modules() if isinstance(module, LLaMAMoE)}
    found = [name for name, module in model.named_modules() if type(module) is nn.Linear and module not in routers]
    lists = [f"{name}." if name else "" for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [name for name in found if any(name.startswith(prefix) for prefix in lists)]


def quantize_model(model: nn.Module, mode: str, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """Quantises the linear layers of the blocks of `model`, one after the other, in place and where they are.

    Args:
        model: Any module tree whose blocks stand in a `ModuleList`. What is quantised already stays so.
        mode: One of `MODES`.
        compute_dtype: What the layers compute in, whatever their input is; default: the dtype of each weight.

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: The mode is unknown, or the model has no such layer.
    """
    check_mode(mode)
    load_bitsandbytes()
    names = quantizable_linears(model)
    if not names and not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no linear layers in a ModuleList of blocks that could be quantised"
        )
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, quantized(model.get_submodule(name), mode, compute_dtype))
    return model


def quantized(linear: nn.Linear, mode: str, compute_dtype: torch.dtype | None = None) -> QuantizedLinear:
    """A quantised layer with the weight and bias of `linear`."""
    kind = Linear8bit if mode.startswith("bnb.int8") else Linear4bit
    return kind(linear, mode, compute_dtype or linear.weight.dtype).train(linear.training)


def load_quantized(
    model: nn.Module, checkpoint_dir: Path | str, mode: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> nn.Module:
    """Loads a checkpoint into a model on the meta device and quantises it block by block, so that memory never holds
    more than one block beside what is quantised.

    Args:
        model: Built within `meta_device()`.
        checkpoint_dir: Ours or Hugging Face's, see `open_weights`.
        mode: One of `MODES`.
        dtype: Of everything that is not quantised, and of the computation.
        device: Where each block is quantised, and where the model then is.

    Returns:
        The model. Buffers that its constructor computes and no checkpoint holds are still on the meta device; in that
        case the rest stays where it was read to.
    """
    check_mode(mode)
    tensors, config = open_weights(checkpoint_dir), getattr(model, "config", None)
    if isinstance(config, Config) and not tensors.keys() <= model.state_dict().keys():
        tensors = open_model_weights(checkpoint_dir, config)
    check_fit(model, tensors, checkpoint_dir)
    for path in _blocks(model):
        block, prefix = model.get_submodule(path), f"{path}."
        part = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        block.load_state_dict(_read(part, dtype), assign=True)
        quantize_model(nn.ModuleList([block.to(device)]), mode, dtype)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    model.load_state_dict(_read(tensors, dtype), strict=False, assign=True)
    is_whole = not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.to(device) if is_whole else model


def _blocks(model: nn.Module) -> Iterator[str]:
    """Paths of the blocks with something to quantise; blocks within blocks belong to the outer one."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name in lists:
        if not any(name.startswith(f"{other}.") for other in lists):
            for i, block in enumerate(model.get_submodule(name)):
                if quantizable_linears(nn.ModuleList([block])):
                    yield f"{name}.{i}"


def _read(tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: (tensor.to(dtype) if tensor.dtype.is_floating_point else tensor).read()
        for name, tensor in tensors.items()
    }
