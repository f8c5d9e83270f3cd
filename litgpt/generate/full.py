"""`litgpt generate_full`: answer with a model all of whose weights were finetuned."""

from pathlib import Path
from typing import Any

from torch import nn

from litgpt.config import Config
from litgpt.generate.base import Quantize, write_texts
from litgpt.generate.loading import find_weights, load_model
from litgpt.registry import ModelSpec


def main(
    checkpoint_dir: Path,
    prompt: str = "What food do llamas eat?",
    input: str = "",
    sys_prompt: str | None = None,
    finetuned_path: Path = Path("out/finetune/full/final/lit_model.pth"),
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
    """Answer a prompt with a fully finetuned model. The answer goes to stdout, everything else to stderr.

    Args:
        checkpoint_dir: Folder of the model that was finetuned, for its config and tokenizer.
        prompt: The instruction or question, in the words that the finetuning data uses.
        input: What the instruction is about, for prompt styles that have a place for it, such as alpaca.
        sys_prompt: System prompt, for prompt styles that have one.
        finetuned_path: The finetuned weights, or the folder that finetune_full wrote them to.
        quantize: Keep the weights of the blocks in 4 bits (bnb.nf4 is the best of them, -dq a little smaller) or in 8.
        max_new_tokens: Length of the answer at most, in tokens.
        top_k: Draw only from the so many most likely tokens; null draws from all.
        top_p: Draw only from the fewest tokens whose probabilities add up to this; 1 draws from all.
        temperature: Below 1 makes the text more predictable, above 1 less; 0 always takes the most likely token.
        precision: 32-true, bf16-true, 16-true, bf16-mixed, 16-mixed or 64-true. Default: bf16-true where there is bf16.
        seed: The same seed gives the same answer.
        stream: Print each piece of the answer as soon as it is certain.
    """
    weights = find_weights(finetuned_path, "lit_model.pth", "finetune_full")

    def load(spec: ModelSpec, config: Config, checkpoint_dir: Path, *how: Any) -> nn.Module:
        return load_model(spec, config, weights, *how)

    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    write_texts(
        checkpoint_dir, prompt, sampling, load=load, style_dir=weights.parent, with_prompt=False, input=input,
        sys_prompt=sys_prompt, quantize=quantize, max_new_tokens=max_new_tokens, precision=precision, seed=seed,
        stream=stream,
    )  # fmt: skip
