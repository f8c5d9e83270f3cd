"""Replacing layers of a model that stands already, by name, and saying by name what is trained; for any `nn.Module`."""

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class WrappedLinear(nn.Module):
    """A linear layer with something around it. The layer itself is `linear`, so its weight is `<name>.linear.weight` in
    a state dict; one that says `<name>.weight`, as the model had it before, loads too."""

    def __init__(self, linear: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = linear

    in_features = property(lambda self: self.linear.in_features, doc="Width of the input.")
    out_features = property(lambda self: self.linear.out_features, doc="Width of the output.")
    weight = property(lambda self: self.linear.weight, doc="What the layer multiplies by, where code reads that.")
    bias = property(lambda self: self.linear.bias, doc="What the layer adds, where code reads that.")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer itself gives."""
        return self.linear(x)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        own = {*self._parameters, *self._buffers, *self._modules}
        for name in [name for name in state_dict if name.startswith(prefix)]:
            rest = name[len(prefix) :]
            if rest.partition(".")[0] not in own:
                state_dict.setdefault(f"{prefix}linear.{rest}", state_dict.pop(name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def linear_names(model: nn.Module) -> list[str]:
    """Paths of the linear layers, also quantised ones, that nothing is wrapped around."""
    names: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if name and isinstance(module, nn.Linear):
            parent = model.get_submodule(name.rpartition(".")[0])
            names += [] if isinstance(parent, WrappedLinear) else [name]
    return names


def find_linears(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Paths of the linear layers that any of `targets` means, in the order of the model.

    Args:
        targets: Each a name that the path is or ends with (`qkv`, `attn.qkv`), a glob (`h.*.attn.*`, where `*` also
            stands for dots), or a regular expression for the whole path.

    Raises:
        ValueError: One of them matches nothing; the message lists what there is.
    """
    names, targets = linear_names(model), [targets] if isinstance(targets, str) else list(targets)
    found = {target: {name for name in names if is_match(name, target)} for target in targets}
    if missed := [target for target, matches in found.items() if not matches] or ([] if targets else ["(none given)"]):
        what = f"no linear layer of {type(model).__name__} is called {' or '.join(missed)}"
        raise ValueError(f"{what}; there are: {describe_linears(model)}")
    return [name for name in names if any(name in matches for matches in found.values())]


def describe_linears(model: nn.Module) -> str:
    """The paths of `linear_names`, once for all layers of a kind, for a message."""
    return ", ".join(dict.fromkeys(_NUMBER.sub("*", name) for name in linear_names(model))) or "none, or all wrapped"


def is_match(name: str, target: str) -> bool:
    """Whether the path `name` is what `target` means, see `find_linears`."""
    if re.fullmatch(r"[\w.\-]+", target):
        return f".{name}".endswith(f".{target}")
    if not re.search(r"[\\^$(|+{]", target):
        if fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}"):
            return True
        if ".*" not in target or target.startswith("*"):  # no regular expression begins with a star
            return False
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise ValueError(f"{target!r} is neither a name nor a glob nor a regular expression: {error}") from None


def swap_linears(
    model: nn.Module, targets: str | Iterable[str], build: Callable[[str, nn.Module], nn.Module]
) -> list[str]:
    """Puts `build(path, layer)` in the place of each linear layer that `targets` mean; returns their paths.

    For `targets` and errors see `find_linears`.
    """
    names = find_linears(model, targets)
    replace_layers(model, names, build)
    return names


def replace_layers(model: nn.Module, names: Iterable[str], build: Callable[[str, nn.Module], nn.Module]) -> None:
    """Puts `build(path, layer)` in the place of the layers at `names`; one at several places is built once."""
    built: dict[nn.Module, nn.Module] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(name)
        if layer not in built:
            built[layer] = build(name, layer).train(layer.training)
        setattr(model.get_submodule(parent), leaf, built[layer])


def unwrap(model: nn.Module) -> None:
    """Puts each wrapped layer back in its place, so that names and speed are those of the plain model."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, WrappedLinear):
                setattr(parent, name, child.linear)


def freeze(model: nn.Module) -> None:
    """Nothing of the model is trained."""
    model.requires_grad_(False)


def keep(model: nn.Module, predicate: Callable[[str], bool]) -> None:
    """Trains the floating point parameters whose name `predicate` accepts; leaves the others as they are."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and predicate(name):
            parameter.requires_grad_()


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Stores frozen linear layers in `dtype`. Under autocast to `dtype` results are the same to the last bit, without a
    cast of each weight at each step and in half the memory. Weights that an embedding or a norm shares stay."""
    others = [module for module in model.modules() if not isinstance(module, nn.Linear)]
    shared = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if type(module) is nn.Linear else ():
            if not parameter.requires_grad and parameter.dtype == torch.float32 and id(parameter) not in shared:
                parameter.data = parameter.data.to(dtype)
