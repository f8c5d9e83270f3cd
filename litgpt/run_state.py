"""The state of a run: its model, random generators, checkpoint folders, and going on from one of them."""

import math
import os
import random
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from litgpt.args import TrainArgs
from litgpt.checkpoint.atomic import atomic_folder
from litgpt.checkpoint.folders import WEIGHTS_NAME, copy_config_files, step_files
from litgpt.checkpoint.io import load_model_weights, load_torch, save_torch
from litgpt.config import Config, save_config
from litgpt.parallel import full_state, is_sharded, load_full_optimizer_state
from litgpt.parser_config import save_hyperparameters
from litgpt.registry import ModelSpec, build_model

if TYPE_CHECKING:
    import lightning as L


def load_model(fabric: "L.Fabric", spec: ModelSpec, config: Config, weights: Path | None) -> nn.Module:
    """The model with weights of a checkpoint, or new ones; one without `init_weights` has them when it is built."""
    with fabric.init_tensor():
        device = torch.device("cpu") if is_sharded(fabric) else fabric.device
        model = build_initialised(spec, config, device) if hasattr(spec.model, "init_weights") else None
        model = build_model(spec, config) if model is None else model
    if weights is not None:
        load_model_weights(model, weights)
    return model


@torch.no_grad()
def build_initialised(spec: ModelSpec, config: Config, device: torch.device) -> nn.Module:
    """A new model whose weights were drawn once, by its `init_weights`: its constructor runs on the meta device.

    What `init_weights` leaves alone, such as a parameter of a module of your own without `reset_parameters`, is what
    the constructor makes it. NaN shows whether there is such a tensor; then the model is built again, in memory.
    """
    try:
        with torch.device("meta"):
            model = build_model(spec, config)
        model.to_empty(device=device)
        tensors = [*model.parameters(), *model.buffers()]
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
        model.init_weights()
        if all(tensor.is_floating_point() and not tensor.isnan().any() for tensor in tensors):
            return model
    except (NotImplementedError, RuntimeError):  # its constructor reads values of tensors
        pass
    with device:
        model = build_model(spec, config)
    model.init_weights()
    return model


def capture_rng(fabric: "L.Fabric") -> dict[str, Any]:
    """State of the random generators of all devices; called by all of them, holds tensors and plain values only."""
    state = {"torch": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(fabric.device)
    if fabric.world_size > 1:
        state = {key: _gather(value.to(fabric.device), fabric.world_size).cpu() for key, value in state.items()}
    else:
        state = {key: value[None] for key, value in state.items()}
    version, numbers, gauss = random.getstate()
    return {**state, "python": [version, list(numbers), gauss]}


def _gather(value: torch.Tensor, world_size: int) -> torch.Tensor:
    values = [torch.empty_like(value) for _ in range(world_size)]
    torch.distributed.all_gather(values, value)
    return torch.stack(values)


def restore_rng(fabric: "L.Fabric", state: Mapping[str, Any]) -> None:
    """Go on where `capture_rng` was called. On another number of devices each goes on by its own seed."""
    if len(state["torch"]) != fabric.world_size:
        return
    torch.set_rng_state(state["torch"][fabric.global_rank])
    if fabric.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"][fabric.global_rank], fabric.device)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def save_run(
    fabric: "L.Fabric",
    state: dict[str, Any],
    tokenizer_dir: Path | None,
    checkpoint_file: Path,
    command: Callable[..., Any],
    *,
    is_saved: Callable[[str], bool] | None = None,
    weights_only: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint folder that appears only when it is complete. Called by all devices, written by the first.

    Args:
        fabric: Says which device this is.
        state: What `resume_run` brings back: model, optimizer, loader, counters, and plain values under `run`.
        tokenizer_dir: Its tokenizer and config files are copied.
        checkpoint_file: The weights file in the folder.
        command: Whose settings go into hyperparameters.yaml.
        is_saved: Which weights are written, by name; None: all.
        weights_only: Leave out all that only a resumed run needs.
        finish: Adds to the folder before it appears.
    """
    model_state, optimizer_state = full_state(fabric, state["model"], state["optimizer"], is_saved is not None)
    model_state = {name.replace("_orig_mod.", ""): tensor for name, tensor in model_state.items()}
    payload = {"model": {name: x for name, x in model_state.items() if is_saved is None or is_saved(name)}}
    rng = capture_rng(fabric)
    if fabric.global_rank == 0:
        loader = state["train_dataloader"]
        if not weights_only:
            payload |= {
                "optimizer": optimizer_state,
                "train_dataloader": loader.state_dict() if hasattr(loader, "state_dict") else {},
                **{name: state[name] for name in ("iter_num", "step_count", "total_tokens")},
                **{name: state[name] for name in ("scheduler", "run") if name in state},
                "rng": rng,
            }
        with atomic_folder(checkpoint_file.parent) as folder:
            save_torch(payload, folder / checkpoint_file.name)
            if tokenizer_dir is not None:
                copy_config_files(tokenizer_dir, folder)
            save_config(state["model"].config, folder)
            save_hyperparameters(command, folder)
            if finish is not None:
                finish(folder)
    fabric.barrier()


def rotate_checkpoints(fabric: "L.Fabric", out_dir: Path, n_kept: int | None, weights_name: str = WEIGHTS_NAME) -> None:
    """Remove all but the newest `n_kept` step folders; a kill in between leaves no folder that looks complete."""
    if n_kept is None or fabric.global_rank != 0:
        return
    for file in step_files(out_dir, weights_name)[:-n_kept]:
        doomed = file.parent.rename(out_dir / f".{file.parent.name}.tmp-{os.getpid()}")
        shutil.rmtree(doomed)


def resume_run(
    fabric: "L.Fabric",
    path: Path,
    state: dict[str, Any],
    train: TrainArgs,
    overfit: int | None,
    way_out: str = "start from them with --initial_checkpoint_dir",
) -> None:
    """Bring everything but the weights to where the checkpoint stood; one of 0.5.x has no random state."""
    payload = load_torch(path)
    try:
        load_full_optimizer_state(fabric, state["model"], state["optimizer"], payload["optimizer"])
    except KeyError:
        raise ValueError(f"{path} holds weights only: {way_out}.") from None
    except ValueError as error:
        raise ValueError(f"{path} was trained with another optimizer ({error}): resume with the same one.") from error
    state |= {"iter_num": payload["iter_num"], "step_count": payload["step_count"]}
    n_samples = state["iter_num"] * train.micro_batch_size * fabric.world_size
    tokens_per_sample = train.max_seq_length or state["model"].config.block_size
    state["total_tokens"] = payload.get("total_tokens", n_samples * tokens_per_sample)
    state |= {name: payload[name] for name in ("rng", "run") if name in payload}
    loader = state["train_dataloader"]
    if overfit is None and not hasattr(loader, "load_state_dict"):
        state["skip"] = state["iter_num"]
    elif overfit is None:
        try:
            loader.load_state_dict(payload["train_dataloader"])
        except (ValueError, KeyError) as error:
            warnings.warn(f"{error}; going on after {n_samples} samples", stacklevel=1)
            loader.load_state_dict(loader.state_dict() | {"samples": n_samples})
    fabric.print(f"Resuming after step {state['step_count']} from {path}")
