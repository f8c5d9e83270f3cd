"""`litgpt generate_adapter`: answer with a model and the adaption prompts that were trained for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litgpt.adapter import adapter_filter, add_adapter
from litgpt.checkpoint.folders import some
from litgpt.checkpoint.tensors import open_weights
from litgpt.config import Config
from litgpt.generate.base import Quantize, write_texts
from litgpt.generate.loading import find_weights, load_model
from litgpt.model import CausalSelfAttention
from litgpt.registry import ModelSpec


def main(
    checkpoint_dir: Path,
    prompt: str = "What food do llamas eat?",
    input: str = "",
    sys_prompt: str | None = None,
    adapter_path: Path = Path("out/finetune/adapter/final/lit_model.pth.adapter"),
    quantize: Quantize | None = None,
    max_new_tokens: int = 100,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    precision: str | None = None,
    *,
    seed: int = 1234,
    stream: bool = True,
) -> None:
    """Answer a prompt with a model and its adapter. The answer goes to stdout, everything else to stderr.

    Args:
        checkpoint_dir: Folder of the model that the adapter was trained for.
        prompt: The instruction or question, in the words that the finetuning data uses.
        input: What the instruction is about, for prompt styles that have a place for it, such as alpaca.
        sys_prompt: System prompt, for prompt styles that have one.
        adapter_path: The trained adapter, or the folder that finetune_adapter wrote it to.
        quantize: Keep the weights of the blocks in 4 bits (bnb.nf4 is the best of them, -dq a little smaller) or in 8.
        max_new_tokens: Length of the answer at most, in tokens.
        top_k: Draw only from the so many most likely tokens; null draws from all.
        top_p: Draw only from the fewest tokens whose probabilities add up to this; 1 draws from all.
        temperature: Below 1 makes the text more predictable, above 1 less; 0 always takes the most likely token.
        precision: 32-true, bf16-true, 16-true, bf16-mixed, 16-mixed or 64-true. Default: bf16-true where there is bf16.
        seed: The same seed gives the same answer.
        stream: Print each piece of the answer as soon as it is certain.
    """
    path = find_weights(adapter_path, "lit_model.pth.adapter", "finetune_adapter")
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    write_texts(
        checkpoint_dir, prompt, sampling, load=adapter_loader(path, add_adapter, adapter_filter), style_dir=path.parent,
        with_prompt=False, input=input, sys_prompt=sys_prompt, quantize=quantize, max_new_tokens=max_new_tokens,
        precision=precision, seed=seed, stream=stream,
    )  # fmt: skip


def adapter_loader(
    path: Path, add: Callable[..., nn.Module], is_part: Callable[[str, Any], bool]
) -> Callable[..., nn.Module]:
    """A `load_model` whose models have the adapter in the file `path`, which `add` makes room for."""

    def load(
        spec: ModelSpec, config: Config, checkpoint_dir: Path, device: torch.device, dtype: torch.dtype, *how: Any
    ) -> nn.Module:
        model = load_model(spec, config, checkpoint_dir, device, dtype, *how)
        load_adapter(model, path, add, is_part)
        return model.to(device=device, dtype=dtype).eval()

    return load


def load_adapter(
    model: nn.Module, path: Path, add: Callable[..., nn.Module], is_part: Callable[[str, Any], bool]
) -> None:
    """Adds an adapter of the size that the file `path` has, and loads it.

    Raises:
        ValueError: The file holds the adapter of another model or method.
    """
    tensors, before = open_weights(path), set(model.state_dict())
    prompts = {name: tensor.shape for name, tensor in tensors.items() if name.endswith(".adapter_wte.weight")}
    layers = [name for name, module in model.named_modules() if isinstance(module, CausalSelfAttention)]
    start = next((i for i, name in enumerate(layers) if f"{name}.adapter_wte.weight" in prompts), None)
    size = () if start is None else (prompts[f"{layers[start]}.adapter_wte.weight"][0], start)
    add(model, *size)
    wanted = {name for name in model.state_dict() if name not in before and is_part(name, None)}
    try:
        found = model.load_state_dict({name: tensor.read() for name, tensor in tensors.items()}, strict=False)
        problems = {"missing": sorted(wanted - tensors.keys()), "unexpected": found.unexpected_keys}
        reason = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
    if reason:
        raise ValueError(f"{path} does not fit the model ({reason}): it belongs to another model or another method")
