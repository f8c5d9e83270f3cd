"""The command `litgpt validate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint.crc import check_crc, has_checksums
from litgpt.checkpoint.folders import WEIGHTS_NAME, existing_folder, find_weights_file, some
from litgpt.checkpoint.loading import check_fit, open_model_weights
from litgpt.checkpoint.meta import meta_device
from litgpt.checkpoint.tensors import files_of
from litgpt.config import Config
from litgpt.plan import estimate_model_memory
from litgpt.registry import ModelSpec, build_model, load_checkpoint_config
from litgpt.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SENTENCE = "Does the tokenizer keep a short text as it is?"


def validate_setup(
    checkpoint_dir: Path,
    model_filename: str = WEIGHTS_NAME,
    dtype: str = "float32",
    training: bool = False,
    checksums: bool = True,
) -> None:
    """Check a checkpoint folder, of litgpt or of Hugging Face, without loading the model.

    Prints a line for each step: files, checksums, config, names and shapes of the weights, tokenizer, memory. Ends
    with status 1 if one of them fails.

    Args:
        checkpoint_dir: Folder to check. checkpoints/NAME may be given as NAME.
        model_filename: Weights file in it. Where there is no lit_model.pth, safetensors and .bin files are looked for.
        dtype: float32, float16 or bfloat16 of the weights in the memory estimate.
        training: Estimate the memory of training, not that of inference.
        checksums: Compare the weights with the checksums that were written with them, for which the files are read
            once. The other steps read no weights.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known: choose {', '.join(DTYPES)}")
    folder = existing_folder(checkpoint_dir)
    steps = _Steps()
    weights = steps.run("files", lambda: _find_files(folder, model_filename))
    if checksums:
        steps.run("checksums", lambda: _compare_checksums(weights), weights)
    found = steps.run("config", lambda: _read_config(folder))
    steps.run("weights", lambda: _compare_names(weights, *found), weights, found)
    steps.run("tokenizer", lambda: _try_tokenizer(folder, found and found[1]))
    steps.run("memory", lambda: _estimate(found[1], DTYPES[dtype], training), found)
    if steps.faults:
        raise ValueError(f"{folder} is no valid checkpoint: {'; '.join(steps.faults)}")


class _Steps:
    """Runs one check after the other and says how it went; what a failed one should have given is None."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def run(self, name: str, check: Callable[[], tuple[str, Any]], *needed: Any) -> Any:
        """Print the line of one step.

        Args:
            name: Of the step.
            check: Gives what to print behind "ok", and what later steps need.
            needed: Results of earlier steps; the step is left out if one is lacking.
        """
        if any(result is None for result in needed):
            print(f"{name:<10} left out", flush=True)
            return None
        try:
            text, result = check()
        except (OSError, ValueError, NotImplementedError) as error:
            print(f"{name:<10} failed", flush=True)
            self.faults.append(" ".join(str(error).split()))
            return None
        print(f"{name:<10} ok      {text}", flush=True)
        return result


def format_size(n_bytes: float) -> str:
    """`1.23 GB`, or `1.2 MB` where that says more."""
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def _find_files(folder: Path, model_filename: str) -> tuple[str, Path]:
    weights = folder / model_filename
    if not weights.is_file():
        if model_filename != WEIGHTS_NAME:
            raise FileNotFoundError(f"{weights} is not there")
        weights = find_weights_file(folder)
    files = files_of(weights)
    shards = [file for file in files if not file.name.endswith(".index.json")]
    if lacking := [file.name for file in shards if not file.is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {len(lacking)} of {len(shards)} shards ({some(lacking)}); download or copy them again"
        )
    size = sum(file.stat().st_size for file in shards)
    return f"{weights.name}, {len(shards)} file{'s' * (len(shards) > 1)}, {format_size(size)}", weights


def _compare_checksums(weights: Path) -> tuple[str, bool]:
    if not has_checksums(weights):
        return f"none were written with {weights.name}", True
    check_crc(weights)
    return "as when they were written", True


def _read_config(folder: Path) -> tuple[str, tuple[ModelSpec, Config]]:
    spec, config = load_checkpoint_config(folder)
    return f"{config.name or spec.name}, {config.n_layer} layers, width {config.n_embd}", (spec, config)


def _compare_names(weights: Path, spec: ModelSpec, config: Config) -> tuple[str, bool]:
    with meta_device():
        model = build_model(spec, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = open_model_weights(weights, config, weight_map=spec.weight_map, shapes=shapes)
    check_fit(model, tensors, weights)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return f"{len(tensors)} tensors fit the model, {', '.join(dtypes)}", True


def _try_tokenizer(folder: Path, config: Config | None) -> tuple[str, bool]:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode(_SENTENCE, bos=False, eos=False)
    # not by the size of the vocabulary: Gemma 3 has a token for images, which the embedding of its text part lacks
    if config is not None and (largest := int(ids.max())) >= config.padded_vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} gives the token {largest}, but the model knows only "
            f"{config.padded_vocab_size}: they do not belong together"
        )
    decoded = tokenizer.decode(ids)
    if decoded.split() != _SENTENCE.split():
        raise ValueError(f"the tokenizer in {folder} turns {_SENTENCE!r} into {decoded[:100]!r}: take its files again")
    return f"{tokenizer.vocab_size:,} tokens", True


def _estimate(config: Config, dtype: torch.dtype, training: bool) -> tuple[str, bool]:
    estimate = estimate_model_memory(config, dtype, training)
    text = f"{format_size(estimate['estimated_total_gb'] * 1e9)} for {'training' if training else 'inference'}"
    if (available := estimate.get("available_gpu_memory_gb")) is not None:
        text += f", {'fits' if estimate['fits_in_memory'] else 'does not fit'} in the {available:.1f} GB of the GPU"
    return text, True
