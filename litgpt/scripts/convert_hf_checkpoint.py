"""The command `litgpt convert_to_litgpt`, and the published functions of this module."""

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from litgpt.checkpoint.adapter import StateDictAdapter, find_model_type
from litgpt.checkpoint.atomic import atomic_file, check_disk_space, remove_leftovers
from litgpt.checkpoint.crc import CHECKSUMS_NAME, check_crc
from litgpt.checkpoint.folders import WEIGHTS_NAME, existing_folder, find_weights_file
from litgpt.checkpoint.hf_config import config_from_hf, read_hf_config
from litgpt.checkpoint.layouts import order_heads
from litgpt.checkpoint.lazy import cast_all
from litgpt.checkpoint.loading import check_fit, open_model_weights
from litgpt.checkpoint.meta import meta_device
from litgpt.checkpoint.tensors import LazyTensor, files_of, open_weights, write_torch
from litgpt.config import Config, save_config
from litgpt.registry import ModelSpec, build_model, get_model_spec, load_checkpoint_config

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}


def convert_hf_checkpoint(
    checkpoint_dir: Path,
    *,
    model_name: str | None = None,
    dtype: str | None = None,
    debug_mode: bool = False,
    delete_source: bool = False,
) -> None:
    """Write the Hugging Face weights of a folder as lit_model.pth beside them, with a model_config.yaml.

    No command needs this: all of them read a Hugging Face folder in place. It serves scripts that look for
    lit_model.pth, and weights that should be kept in another dtype.

    Args:
        checkpoint_dir: Folder with config.json and *.safetensors or pytorch_model*.bin. checkpoints/NAME may be given
            as NAME.
        model_name: Named config to go by where config.json alone does not say enough. Without it: config.json, or the
            name of the folder.
        dtype: float32, float16, bfloat16 or float64 to cast to; without it the weights stay as they are.
        debug_mode: Print each tensor instead of a progress bar.
        delete_source: Remove the Hugging Face weight files once the new file is on the disk and was read back and
            compared with its checksums. Without it both copies stay.
    """
    folder = existing_folder(checkpoint_dir)
    if dtype is not None and dtype.removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known: choose {', '.join(DTYPES)}")
    remove_leftovers(folder)
    source, target = find_weights_file(folder, but=WEIGHTS_NAME), folder / WEIGHTS_NAME
    spec, config = _find_config(folder, model_name)
    if delete_source and target.is_file() and not all(path.is_file() for path in files_of(source)):
        _delete_source(source, spec, config)  # an earlier run was ended while it did this
        return
    model = _on_meta(spec, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = open_model_weights(source, config, weight_map=spec.weight_map, shapes=shapes)
    if dtype is not None:
        tensors = cast_all(tensors, DTYPES[dtype.removeprefix("torch.")])
    check_fit(model, tensors, source)
    n_bytes = sum({id(tensor): tensor.n_bytes for tensor in tensors.values()}.values())
    check_disk_space(target, n_bytes)
    with atomic_file(folder / "model_config.yaml") as file:
        file.write(_yaml(config))
    show_bar = sys.stderr.isatty() and not debug_mode
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc=WEIGHTS_NAME, disable=not show_bar) as bar:
        write_torch(target, _watched(tensors, bar, debug_mode))
    print(f"{target}: {len(tensors)} tensors, {target.stat().st_size / 1e6:,.1f} MB")
    if delete_source:
        _delete_source(source, spec, config)


def _find_config(folder: Path, model_name: str | None) -> tuple[ModelSpec, Config]:
    if model_name is None:
        return load_checkpoint_config(folder)
    if (folder / "config.json").is_file():
        return get_model_spec("gpt"), config_from_hf(read_hf_config(folder), model_name)
    return get_model_spec("gpt"), Config.from_name(model_name)


def _on_meta(spec: ModelSpec, config: Config) -> torch.nn.Module:
    with meta_device():
        return build_model(spec, config)


def _delete_source(source: Path, spec: ModelSpec, config: Config) -> None:
    """Remove what was converted, after a look at what it became."""
    target = source.with_name(WEIGHTS_NAME)
    check_crc(target)
    check_fit(_on_meta(spec, config), open_weights(target), target)
    for path in (*files_of(source), source.with_name(CHECKSUMS_NAME)):
        path.unlink(missing_ok=True)
    print(f"{target} was read back and compared; {source.name} and what belongs to it are removed")


def _watched(tensors: dict[str, LazyTensor], bar: tqdm, is_verbose: bool) -> dict[str, LazyTensor]:
    """The same tensors, which report how far they are read."""

    def pieces(name: str, tensor: LazyTensor) -> Iterator[Tensor]:
        if is_verbose:
            print(f"{name}: {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
        for piece in tensor.iter_pieces():
            yield piece
            bar.update(piece.numel() * piece.element_size())

    watched = {id(t): replace(t, pieces=partial(pieces, name, t)) for name, t in reversed(tensors.items())}
    return {name: watched[id(tensor)] for name, tensor in tensors.items()}


def _yaml(config: Config) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_config(config, folder)
        return Path(folder, "model_config.yaml").read_bytes()


def qkv_reassemble(param: Tensor | LazyTensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value rows of a projection that is stored group by group, as GPT-NeoX and Falcon do.

    Args:
        param: `((nh + 2 G) * hs, ..)`, weight or bias.
        config: Of the model.
    """
    param = param if isinstance(param, LazyTensor) else LazyTensor.of(param)
    ordered = order_heads(param, config.n_head, config.n_query_groups, grouped=False).read()
    n_kv = len(ordered) // (config.n_head + 2 * config.n_query_groups) * config.n_query_groups
    q, k, v = ordered.split((len(ordered) - 2 * n_kv, n_kv, n_kv))
    return q, k, v


def layer_template(layer_name: str, num_matches: int = 1) -> tuple[str, int]:
    """`("model.layers.{}.mlp.weight", 3)` for `model.layers.3.mlp.weight`; with more matches, more numbers.

    A name without numbers gives the name and -1.
    """
    numbers = [int(number) for number in re.findall(r"(?<=\.)\d+(?=\.|$)", layer_name)[:num_matches]]
    template = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", layer_name, count=num_matches)
    return (template, *(numbers or [-1]))  # type: ignore[return-value]


def load_param(param: Tensor | LazyTensor, name: str, dtype: torch.dtype | None, verbose: bool = False) -> Tensor:
    """The values of `param`, read if they are still on disk, and cast."""
    if verbose:
        print(f"Loading {name}")
    values = param.read() if isinstance(param, LazyTensor) else param
    return values if dtype is None else values.to(dtype)


def _copy_weights(
    model_type: str | None,
    config: Config,
    state_dict: dict[str, Tensor],
    hf_weights: Mapping[str, Tensor | LazyTensor],
    saver: Any = None,
    dtype: torch.dtype | None = None,
    *_: Any,
    debug_mode: bool = False,
    **__: Any,
) -> None:
    """Put the weights of a Hugging Face model into `state_dict` under our names.

    Args:
        model_type: As in config.json; None: by the config.
        config: Of the model.
        state_dict: Is filled.
        hf_weights: All tensors of the checkpoint by name, not those of one shard.
        saver: Not needed any more, and neither are a progress bar and `qkv_weights`.
        dtype: To cast to; None: as they are.
        debug_mode: Print each name.
    """
    tensors = {name: t if isinstance(t, LazyTensor) else LazyTensor.of(t) for name, t in hf_weights.items()}
    adapter = StateDictAdapter(config, model_type or find_model_type(config, tensor_names=tensors))
    for name, tensor in adapter.from_hf(tensors).items():
        state_dict[name] = load_param(tensor, name, dtype, verbose=debug_mode)


def _copy_weights_fused(
    model_type: str | None, config: Config, qkv_weights: dict, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
) -> None:
    _copy_weights(model_type, config, state_dict, *args, **kwargs)


def _copy_weights_gemma(
    model_type: str, qkv_weights: dict, state_dict: dict[str, Tensor], *args: Any, config: Config, **kwargs: Any
) -> None:
    _copy_weights(model_type, config, state_dict, *args, **kwargs)


copy_weights_gpt_neox = partial(_copy_weights, "gpt_neox")
copy_weights_falcon = partial(_copy_weights, "falcon")
copy_weights_hf_llama = partial(_copy_weights_fused, None)
copy_weights_gemma_2 = partial(_copy_weights_gemma, "gemma2")
copy_weights_gemma_3 = partial(_copy_weights_gemma, "gemma3_text")
copy_weights_phi = partial(_copy_weights_fused, None)
copy_weights_qwen_2_5 = partial(_copy_weights_fused, "qwen2")
copy_weights_olmo2 = partial(_copy_weights_fused, "olmo2")
copy_weights_qwen_3 = partial(_copy_weights_fused, None)
