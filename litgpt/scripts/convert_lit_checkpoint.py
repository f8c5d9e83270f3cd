"""The command `litgpt convert_from_litgpt`, and the published functions of this module."""

import re
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from litgpt.checkpoint.adapter import StateDictAdapter
from litgpt.checkpoint.export import check_keys, open_export, write_gguf_file, write_hf_folder, write_hf_state_dict
from litgpt.checkpoint.folders import existing_file, extend_checkpoint_dir
from litgpt.checkpoint.hub import find_checkpoint
from litgpt.checkpoint.layouts import order_heads
from litgpt.checkpoint.lazy import LazyTensor
from litgpt.checkpoint.lora_merge import LORA_NAME
from litgpt.checkpoint.peft_folder import export_peft
from litgpt.config import Config
from litgpt.lora import LoRASettings
from litgpt.model import GPT
from litgpt.registry import ModelSpec, load_checkpoint_config
from litgpt.scripts.merge_lora import load_lora_metadata

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert_lit_checkpoint(
    checkpoint_dir: Path,
    output_dir: Path,
    *,
    format: Literal["hf", "gguf", "pth", "peft"] = "hf",
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    gguf_type: Literal["f16", "bf16", "q8_0"] = "f16",
    max_shard_size: str = "5GB",
) -> None:
    """Write a checkpoint in the form that other programs load. The weights go through memory one at a time.

    `--format hf` writes a folder that transformers, vLLM and TGI load by its name: config.json, model.safetensors (or
    shards with their index), tokenizer, chat template, generation_config.json. All commands of litgpt read it too.
    `--format gguf` writes one file for llama.cpp, Ollama and LM Studio, with tokenizer and chat template.
    `--format pth` writes OUTPUT_DIR/model.pth alone, as 0.5 did, for `from_pretrained(.., state_dict=torch.load(..))`;
    transformers 5 wants None for the name then, and `config=`.
    `--format peft` writes what LoRA finetuning learned, without the model, as an adapter folder for PEFT and vLLM.
    Only one of them is written, so that the weights are not twice on the disk: a script that loads model.pth needs
    `--format pth`.

    Args:
        checkpoint_dir: Folder with the weights, such as the final folder of a run. checkpoints/NAME may be given as
            NAME.
        output_dir: Folder to write into. For hf it must not exist, be empty, or be an earlier export, which is replaced
            once the new one is complete. For gguf a name that ends in .gguf is the file itself.
        format: hf, gguf, pth or peft; see above.
        dtype: float32, float16 or bfloat16 to cast the weights to. Without it they stay as they are. For hf and pth.
        gguf_type: f16, bf16 or q8_0 (8 bits a weight), for the matrices in a GGUF file.
        max_shard_size: Largest size of a safetensors file, such as 5GB or 500MB.
    """
    checkpoint_dir, output_dir = extend_checkpoint_dir(Path(checkpoint_dir)), Path(output_dir)
    max_shard_bytes = parse_size(max_shard_size)
    if not checkpoint_dir.is_dir():
        raise FileNotFoundError(f"{checkpoint_dir} is no folder: name the checkpoint to convert")
    if dtype is not None and format in ("gguf", "peft"):
        raise ValueError(
            f"--dtype {dtype} is for hf and pth" + ": a GGUF file takes `--gguf_type`" * (format == "gguf")
        )
    if format not in ("hf", "gguf", "pth", "peft") or gguf_type not in ("f16", "bf16", "q8_0"):
        choice = "hf, gguf, pth or peft; f16, bf16 or q8_0"
        raise ValueError(f"format {format!r} with gguf_type {gguf_type!r}: choose {choice}")
    if format == "peft":
        return _write_adapter(checkpoint_dir, output_dir)
    spec, config = load_checkpoint_config(checkpoint_dir)
    weight_map, cast_to = _weight_map(spec, format), None if dtype is None else _dtype(dtype)
    try:
        export = open_export(checkpoint_dir, config, cast_to, weight_map)
        if format == "hf":
            files = write_hf_folder(export, output_dir, max_shard_bytes)
        elif format == "gguf":
            files = [write_gguf_file(export, output_dir, gguf_type)]
        else:
            files = [write_hf_state_dict(export, output_dir / "model.pth")]
    except ValueError as error:
        if spec.name == "gpt":
            raise
        raise ValueError(f"this {spec.name} model (a model of your own) is not exported: {error}") from None
    size = sum(file.stat().st_size for file in files)
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    print(f"{files[0]}{more}: a {export.model_type} model, {size / 1e6:,.1f} MB")


def _write_adapter(checkpoint_dir: Path, output_dir: Path) -> None:
    existing_file(checkpoint_dir / LORA_NAME)
    lora, base, _ = load_lora_metadata(checkpoint_dir)
    base = find_checkpoint(base, download=False)
    spec, config = load_checkpoint_config(base)
    if spec.weight_map is not None:
        raise ValueError(f"no other program knows {spec.name} models, so that their updates are of no use there")
    file = export_peft(checkpoint_dir, base, config, LoRASettings.from_flags(lora), output_dir)
    print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB")


def _weight_map(spec: ModelSpec, format: str) -> Any:
    """The names that a registered model asks for; a warning where another program computes something else with them."""
    if spec.weight_map is not None and format != "pth":
        raise ValueError(f"no other program knows {spec.name} models; `--format pth` writes their weights alone")
    if spec.weight_map is None and spec.model is not GPT:
        warnings.warn(
            f"{spec.name} is exported as a plain GPT: what {spec.model.__name__} computes in another way is lost",
            stacklevel=3,
        )
    return spec.weight_map


def _dtype(name: str) -> torch.dtype:
    name = str(name).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16", "float64"):
        raise ValueError(f"dtype {name!r} is not known: choose float32, float16 or bfloat16")
    return getattr(torch, name)


def parse_size(text: str | int) -> int:
    """Bytes of `5GB`, `500MB` or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", str(text).upper())
    if match is None or (match[2] or "") not in (*_UNITS, "B") or not float(match[1]):
        raise ValueError(f"max_shard_size {text!r} is no size above 0, such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS.get(match[2] or "", 1))


# ---------------------------------------------------------------- published in 0.5


def check_conversion_supported(lit_weights: Iterable[str]) -> None:
    """Raise ValueError if LoRA weights are among the names, NotImplementedError if those of adapters are."""
    check_keys(lit_weights)


def qkv_reassemble(param: Tensor | Any, config: Config) -> Tensor:
    """The rows `[Q; K; V]` of a fused projection in the order of GPT-NeoX and Falcon: one group after another."""
    param = param._load_tensor() if hasattr(param, "_load_tensor") else param
    return order_heads(LazyTensor.of(param), config.n_head, config.n_query_groups, grouped=True).read()


def _copy_weights(
    model_type: str | None,
    config: Config,
    state_dict: dict[str, Tensor],
    lit_weights: dict[str, Tensor],
    untie_weights: bool = False,
    saver: Any = None,
) -> None:
    """Put the weights of `lit_weights` into `state_dict` by their names on Hugging Face.

    Args:
        untie_weights: Leave out the head, as for models that tie it to the embedding.
        saver: Takes tensors early, as `incremental_save` does; None: none is.
    """
    lazy = {name: LazyTensor.of(getattr(t, "_load_tensor", lambda t=t: t)()) for name, t in lit_weights.items()}
    for name, tensor in StateDictAdapter(config, model_type).to_hf(lazy).items():
        if not (untie_weights and name == "lm_head.weight"):
            value = (tensor.view or tensor.read)()
            state_dict[name] = value if saver is None else saver.store_early(value)


copy_weights_falcon = partial(_copy_weights, "falcon")
copy_weights_gpt_neox = partial(_copy_weights, "gpt_neox")
copy_weights_llama = partial(_copy_weights, None)
copy_weights_gemma_2 = partial(_copy_weights, "gemma2", untie_weights=True)
copy_weights_gemma_3 = partial(_copy_weights, "gemma3_text", untie_weights=True)
copy_weights_phi = partial(_copy_weights, None)
copy_weights_qwen_2_5 = partial(_copy_weights, "qwen2")
copy_weights_olmo2 = partial(_copy_weights, "olmo2")
copy_weights_qwen_3 = partial(_copy_weights, None)
