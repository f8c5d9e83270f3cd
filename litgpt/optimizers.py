"""Optimizers by name, by class path, or by a map of both with arguments; and Muon with AdamW as one optimizer."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn as nn
import yaml
from torch import Tensor

from litgpt.config import nearest
from litgpt.extension import import_class

HEAD_NAMES = ("lm_head", "head", "output", "unembed")
"""What the layer from the residual stream to the vocabulary is called in the modules we know and in those of others."""


def build_optimizer(optimizer: str | Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer for `model`, fused where there is such a kernel.

    Args:
        optimizer: `"AdamW"`, `"Muon"` or another class of `torch.optim`; a class path; or
            `{"class_path": ..., "init_args": {...}}`. Arguments may also stand beside the class path.
        model: Its parameters that need a gradient are trained.
    """
    return instantiate_torch_optimizer(optimizer, model)


def instantiate_torch_optimizer(
    optimizer: str | Mapping[str, Any], model_parameters: nn.Module | Iterable, **kwargs: Any
) -> torch.optim.Optimizer:
    """An optimizer over given parameters.

    Args:
        optimizer: As for `build_optimizer`.
        model_parameters: A module, or anything that a torch optimizer takes. Muon needs the module.
        kwargs: Further arguments; those that the class does not have are left out.

    Raises:
        ValueError: Unknown class or argument; the message has the nearest known ones.
    """
    optimizer_class, arguments = read_optimizer(optimizer)
    known = inspect.signature(optimizer_class).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    arguments = {**{k: v for k, v in kwargs.items() if k in known or takes_any}, **arguments}
    if optimizer_class is MuonAdamW:
        if not isinstance(model_parameters, nn.Module):
            raise ValueError("Muon needs the model itself, not a list of parameters, to tell its layers apart.")
        return MuonAdamW(*split_for_muon(model_parameters), **arguments)
    if isinstance(model_parameters, nn.Module):
        model_parameters = [p for p in model_parameters.parameters() if p.requires_grad]
    if issubclass(optimizer_class, (torch.optim.Adam, torch.optim.AdamW)) and not arguments.keys() & {
        "fused",
        "foreach",
    }:
        model_parameters = list(model_parameters)
        try:
            return optimizer_class(model_parameters, fused=True, **arguments)
        except (RuntimeError, TypeError):  # no fused kernel for this device or class
            pass
    try:
        return optimizer_class(model_parameters, **arguments)
    except TypeError as error:
        raise ValueError(f"--optimizer {optimizer_class.__name__} with {arguments}: {error}") from error


def instantiate_bnb_optimizer(optimizer: str | Mapping[str, Any], model_parameters: Iterable) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes, whose moments move to the CPU's memory when that of the GPU is full."""
    return instantiate_torch_optimizer(paged_adamw(optimizer), model_parameters)


def paged_adamw(optimizer: str | Mapping[str, Any]) -> dict[str, Any]:
    """What asks for AdamW turned into what asks for that of bitsandbytes, with the arguments that it knows.

    Raises:
        ValueError: Another optimizer was asked for.
    """
    optimizer_class, arguments = read_optimizer(optimizer)
    if optimizer_class.__name__ not in ("AdamW", "PagedAdamW"):
        raise ValueError(f"--optimizer {optimizer_class.__name__} does not go with --quantize on a GPU: use AdamW.")
    from bitsandbytes.optim import PagedAdamW

    known = inspect.signature(PagedAdamW).parameters
    kept = {name: value for name, value in arguments.items() if name in known}
    return {"class_path": "bitsandbytes.optim.PagedAdamW", "init_args": kept}


def default_lr(optimizer: str | Mapping[str, Any]) -> float:
    """The learning rate that is asked for, or else that of the optimizer's class."""
    optimizer_class, arguments = read_optimizer(optimizer)
    return arguments.get("lr", inspect.signature(optimizer_class).parameters["lr"].default)


def read_optimizer(optimizer: str | Mapping[str, Any]) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Class and arguments that a command line or a YAML file names."""
    if isinstance(optimizer, str) and optimizer.lstrip().startswith("{"):
        optimizer = yaml.safe_load(optimizer)
    if isinstance(optimizer, str):
        return _find_class(optimizer), {}
    given = dict(optimizer)
    optimizer_class = _find_class(str(given.pop("class_path", "AdamW")))
    arguments = {**given, **(given.pop("init_args", None) or {})}
    arguments.pop("init_args", None)
    known = [name for name in inspect.signature(optimizer_class).parameters if name not in ("params", "hidden", "rest")]
    takes_any = "kwargs" in known
    for name in [name for name in arguments if name not in known and not takes_any]:
        if name not in _arguments_of_all_optimizers():
            close = nearest(name, known)
            raise ValueError(
                f"--optimizer {optimizer_class.__name__} has no argument {name!r}"
                f"{f'; did you mean {close[0]}?' if close else '.'} It takes {', '.join(known)}."
            )
        # Recipes name arguments of another optimizer than the one finally chosen; 0.5.x dropped them silently.
        warnings.warn(f"--optimizer {optimizer_class.__name__} has no argument {name!r}; it is ignored.", stacklevel=4)
        del arguments[name]
    return optimizer_class, {name: _as_number(value) for name, value in arguments.items()}


class MuonAdamW(torch.optim.Optimizer):
    """Muon (torch.optim.Muon) for the matrices inside the network, AdamW for all else, as one optimizer.

    Its groups are Muon's followed by AdamW's, its state dict is that of any torch optimizer. By default Muon's updates
    are scaled to the size of AdamW's (arXiv:2502.16982), so that one learning rate serves both.

    Args:
        hidden: 2-D weights, trained by Muon.
        rest: Embeddings, head, norms, biases: trained by AdamW; only those of two or more dimensions decay.
        lr: Learning rate of both.
        weight_decay: Decoupled weight decay of both.
        momentum: Muon's momentum.
        nesterov: Whether Muon looks ahead along the momentum.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: `match_rms_adamw`, or `original` for Muon's own scale (learning rates around 0.02).
        adamw_lr: Learning rate of AdamW, where it is to differ.
        betas: AdamW's decay rates of the moments.
        eps: AdamW's guard against division by 0.
    """

    def __init__(
        self,
        hidden: Iterable[Tensor],
        rest: Iterable[Tensor],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        self.muon = torch.optim.Muon(
            list(hidden), lr, weight_decay, momentum, nesterov, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn
        )
        rest = list(rest)
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = instantiate_torch_optimizer(
            {"class_path": "torch.optim.AdamW", "init_args": {"lr": adamw_lr or lr, "betas": betas, "eps": eps}}, groups
        )
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Let both work on the groups and the state of this object."""
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()` of an object with the same parameters."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss


def split_for_muon(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of `model` for Muon and for AdamW: 2-D weights that are neither embedding nor head, and all others."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        is_head = name.rpartition(".")[0].rpartition(".")[2] in HEAD_NAMES
        if not parameter.requires_grad:
            continue
        (rest if parameter.ndim != 2 or is_head or id(parameter) in embeddings else hidden).append(parameter)
    if not hidden:
        raise ValueError(
            "Muon trains 2-D weights inside the network, but there are none: sharding over devices (FSDP) flattens "
            "them, or the model has no such layers. Use --optimizer AdamW."
        )
    return hidden, rest


def _find_class(name: str) -> type[torch.optim.Optimizer]:
    if name in ("Muon", "torch.optim.Muon"):
        return MuonAdamW
    if "." in name:
        found = import_class(name)
    else:
        found = getattr(torch.optim, name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        names = _all_optimizers()
        close = nearest(name, names)
        raise ValueError(
            f"--optimizer {name!r} is no optimizer{f'; did you mean {close[0]}?' if close else '.'} torch.optim has "
            f"{', '.join(names)}; a class of your own is given as package.module.Class."
        )
    return found


def _all_optimizers() -> dict[str, type]:
    """The optimizers of torch.optim by name."""
    found = {n: c for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    return {name: found[name] for name in sorted(found) if name != "Optimizer"}


def _arguments_of_all_optimizers() -> set[str]:
    return {name for c in _all_optimizers().values() for name in inspect.signature(c).parameters} - {"params"}


def _as_number(value: Any) -> Any:
    """A dotted flag hands on numbers as text, and YAML does so with `1e-3`."""
    value = yaml.safe_load(value) if isinstance(value, str) else value
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
