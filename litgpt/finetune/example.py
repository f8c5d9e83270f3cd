"""What the model answers to an instruction of the data, shown during finetuning."""

import random
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from litgpt.args import EvalArgs
from litgpt.data.base import DataModule
from litgpt.generate.decoding import Decoder, token_stream
from litgpt.generate.sampling import Sampler
from litgpt.generate.stopping import StopMatcher
from litgpt.objective import IGNORE_INDEX, NextToken, Objective
from litgpt.parallel import is_sharded
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    import lightning as L

SAMPLER = Sampler(temperature=0.8, top_k=50)


def generate_example(
    fabric: "L.Fabric",
    model: nn.Module,
    tokenizer: Tokenizer,
    eval: EvalArgs,
    data: DataModule,
    objective: Objective | None = None,
    seed: int = 0,
) -> str | None:
    """Print and return an instruction of the data with the model's answer; None where the data has no such thing.

    All devices call it. Neither the random state nor the mode of the training is changed.
    """
    prompt = example_prompt(data, tokenizer, eval.evaluate_example, seed)
    limit = getattr(model, "max_seq_length", None) or getattr(model.config, "block_size", None) or sys.maxsize
    if prompt is None or len(prompt) >= limit:
        return None
    n_new = min(eval.max_new_tokens or 50, limit - len(prompt))
    idx, rng = prompt.to(fabric.device), torch.Generator(fabric.device).manual_seed(seed)
    predict = (objective or NextToken()).predict
    if getattr(predict, "__func__", predict) is Objective.predict:
        predict = NextToken().predict
    was_training = model.training
    model.eval()
    # no inference mode: what the model keeps of a forward pass may serve in a backward pass
    with torch.no_grad(), fabric.autocast():
        if predict.__func__ is not NextToken.predict or is_sharded(fabric):
            out = predict(model, idx.unsqueeze(0), max_new_tokens=n_new, eos_id=tokenizer.eos_id, rng=rng)
            answer = out["ids"][0, len(idx) : int(out["lengths"][0])].tolist()
        else:
            answer = _answer(fabric, model, idx, n_new, stop_tokens(data, tokenizer), rng)
    model.train(was_training)
    text = tokenizer.decode(torch.tensor([*prompt.tolist(), *answer]))
    fabric.print(text)
    return text


def _answer(
    fabric: "L.Fabric", model: nn.Module, idx: Tensor, n_new: int, stops: list[list[int]], rng: torch.Generator
) -> list[int]:
    """Ids that continue `idx` `(T,)`, with the KV cache where the model has one."""
    inner = getattr(model, "_forward_module", model)
    inner = getattr(inner, "module", inner) if hasattr(inner, "module") else inner
    inner = getattr(inner, "_orig_mod", inner)
    n_returned, matcher, answer = len(idx) + n_new, StopMatcher(stops), []
    has_cache = hasattr(inner, "set_kv_cache")
    with fabric.device:
        if has_cache:
            inner.set_kv_cache(batch_size=1, max_seq_length=n_returned)
        for token in token_stream(Decoder(inner), idx.unsqueeze(0), n_returned, SAMPLER, rng):
            answer.append(int(token))
            matcher.push(answer[-1])
            if matcher.is_stopped:
                break
        if has_cache:
            inner.clear_kv_cache()
    return answer


def stop_tokens(data: DataModule, tokenizer: Tokenizer) -> list[list[int]]:
    """What ends an answer: the sequences of the prompt style, else EOS."""
    style = getattr(data, "prompt_style", None)
    if isinstance(style, PromptStyle):
        return list(style.stop_tokens(tokenizer))
    return [] if tokenizer.eos_id is None else [[tokenizer.eos_id]]


def example_prompt(data: DataModule, tokenizer: Tokenizer, which: str | int, seed: int) -> Tensor | None:
    """Ids `(T,)` of the prompt of one validation sample, or of a training sample where there are none.

    Args:
        which: `first`, `random`, or the number of the sample.
        seed: Of the random choice.
    """
    datasets = [getattr(data, name, None) for name in ("test_dataset", "val_dataset", "train_dataset")]
    dataset = next((d for d in datasets if d is not None and len(d)), None)
    if dataset is None:
        return None
    if str(which) == "random":
        index = random.Random(seed).randrange(len(dataset))
    else:
        index = 0 if which == "first" else int(which)
    if not 0 <= index < len(dataset):
        raise ValueError(f"--eval.evaluate_example is {which}, but the data has {len(dataset)} samples to show")
    if hasattr(data, "example_prompt") and hasattr(dataset, "data"):
        return tokenizer.encode(data.example_prompt(dataset.data[index])).long()
    example = dataset[index]
    return prompt_of(example["input_ids"], example.get("labels"))


def prompt_of(ids: Tensor, labels: Tensor | None) -> Tensor | None:
    """The part of an example `(T,)` before its first trained token; half of it where all is trained."""
    trained = (labels != IGNORE_INDEX).nonzero().flatten() if labels is not None else ()
    n = int(trained[0]) if len(trained) else 0
    n = n or len(ids) // 2
    return ids[:n] if n else None
