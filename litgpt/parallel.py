"""How a model is spread over devices."""

import functools
import re
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from litgpt.model import Block

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def build_strategy(devices: int, num_nodes: int = 1, model_class: type[nn.Module] | None = None) -> Any:
    """What Fabric's `strategy` is for so many devices: FSDP on GPUs, a replica per process on CPUs.

    Args:
        devices: Per node.
        num_nodes: Weights are sharded within a node and replicated between nodes.
        model_class: Its `block_class` is the unit of sharding.
    """
    if devices * num_nodes == 1:
        return "auto"
    if not torch.cuda.is_available():
        return "ddp"
    from lightning.fabric.strategies import FSDPStrategy

    return FSDPStrategy(
        auto_wrap_policy={getattr(model_class, "block_class", Block)},
        state_dict_type="full",
        sharding_strategy="FULL_SHARD" if num_nodes == 1 else "HYBRID_SHARD",
    )


def is_sharded(fabric: "Fabric") -> bool:
    """Whether each device holds only a part of the weights."""
    return type(fabric.strategy).__name__ in ("FSDPStrategy", "ModelParallelStrategy")


def full_state(
    fabric: "Fabric", model: nn.Module, optimizer: torch.optim.Optimizer, only_trained: bool = False
) -> tuple[dict, dict]:
    """State dicts of model and optimizer as one device would have them; called by all devices.

    Where weights are sharded, only rank 0 gets them, on the CPU, and the optimizer's state goes by parameter names;
    `only_trained` then leaves out the frozen ones.
    """
    if not is_sharded(fabric):
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_trained)
    return get_state_dict(*_unwrapped(model, optimizer), options=options)


def load_full_optimizer_state(
    fabric: "Fabric", model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Continue from the optimizer's part of `full_state`, whatever number of devices wrote it.

    Raises:
        ValueError: It belongs to other parameters or another optimizer.
    """
    model, optimizer = _unwrapped(model, optimizer)
    name_of = {id(p): re.sub(r"_orig_mod\.|_fsdp_wrapped_module\.", "", name) for name, p in model.named_parameters()}
    names = [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]
    by_name = any(isinstance(key, str) for key in state["state"])
    if not is_sharded(fabric):
        if by_name:
            indices = {i: state["state"][name] for i, name in enumerate(names) if name in state["state"]}
            state = {"state": indices, "param_groups": optimizer.state_dict()["param_groups"]}
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    if not by_name:
        groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
        state = {"state": {names[i]: value for i, value in state["state"].items()}, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def _unwrapped(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Both without Fabric's wrappers."""
    return getattr(model, "_forward_module", model), getattr(optimizer, "_optimizer", optimizer)


def checkpoint_blocks(model: nn.Module) -> int:
    """Let each block keep only its input for the backward pass, which computes the rest again; returns their number.

    The blocks are the modules of the `ModuleList` with most weights, in any module tree.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()), default=())
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return len(blocks)
