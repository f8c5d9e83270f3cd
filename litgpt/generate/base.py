"""Generating text: the published functions over the decode loop, and `litgpt generate`.

Letters in shapes: B batch, T tokens of the prompt, V vocabulary.
"""

import inspect
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from litgpt.checkpoint.io import check_valid_checkpoint_dir, extend_checkpoint_dir
from litgpt.config import Config
from litgpt.generate.decoding import CompiledStep, Decoder, LengthError, check_room, token_stream
from litgpt.generate.loading import autocast, default_device, load_model, parse_precision
from litgpt.generate.sampling import Sampler, draw, sample_top_p
from litgpt.generate.stopping import StopMatcher, stop_at_text
from litgpt.objective import NextToken, Objective
from litgpt.prompts import PromptStyle, has_prompt_style, load_prompt_style
from litgpt.quantize import check_mode, load_bitsandbytes
from litgpt.registry import ModelSpec, get_objective, load_checkpoint_config
from litgpt.tokenizer import Tokenizer

__all__ = [
    "batched_generate_fn", "batched_next_token", "batched_sample", "generate", "generate_fn", "main",
    "multinomial_num_samples_1", "next_token", "sample", "sample_top_p",
]  # fmt: skip


# ---------------------------------------------------------------- sampling, as published


def multinomial_num_samples_1(probs: Tensor) -> Tensor:
    """One index `(..., 1)` drawn from probabilities `(..., V)`."""
    return draw(probs).unsqueeze(-1)


def sample(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, **more: Any
) -> Tensor:
    """The next token `(1,)` after the last position of the first row of `logits` `(B, T, V)`.

    Args:
        more: `min_p`, and `rng`, the generator to draw from.
    """
    rng = more.pop("rng", None)
    return Sampler(temperature, top_k, top_p, **more)(logits[0, -1:], rng)


def next_token(
    model: nn.Module, input_pos: Tensor, x: Tensor, input_pos_maxp1: int | None = None, **sample_kwargs: Any
) -> Tensor:
    """Feed `x` `(1, T)` at the positions `input_pos` `(T,)` and sample the token `(1,)` after it."""
    return sample(model(x, input_pos, input_pos_maxp1=input_pos_maxp1), **sample_kwargs)


def batched_sample(logits: list[Tensor], kwargs: list[dict]) -> Tensor:
    """One token a row, `(B, 1)`, from a list of B logits `(1, T, V)` with the settings of each row."""
    if len(logits) != len(kwargs):
        raise ValueError(f"{len(logits)} rows of logits but {len(kwargs)} sets of sampling settings: give one a row")
    return torch.stack([sample(row, **settings) for row, settings in zip(logits, kwargs, strict=True)])


def batched_next_token(model: nn.Module, input_pos: Tensor, x: Tensor, kwargs: dict | list[dict]) -> Tensor:
    """Feed `x` `(B, T)` at `input_pos` and sample the tokens `(B, 1)` after it; settings for all rows or for each."""
    logits = model(x, input_pos)  # (B, T, V)
    return batched_sample(list(logits.split(1)), kwargs if isinstance(kwargs, list) else [kwargs] * len(logits))


# ---------------------------------------------------------------- the published functions over it


@torch.inference_mode()
def generate_fn(
    model: nn.Module,
    prompt: Tensor,
    max_returned_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_tokens: tuple[list[int], ...] = (),
    include_prompt: bool,
    include_eos: bool,
    min_p: float = 0.0,
    rng: torch.Generator | None = None,
    decoder: Decoder | None = None,
) -> Iterator[Tensor]:
    """Yield token ids as soon as they are certain: the prompt `(T,)` if wanted, then new tokens `(1,)`.

    Args:
        model: With a KV cache (`set_kv_cache`), or any module `forward(idx) -> logits`.
        prompt: `(T,)` token ids on the model's device.
        max_returned_tokens: Counts the prompt, also where that is not returned.
        temperature: See `Sampler`, also for `top_k`, `top_p` and `min_p`.
        stop_tokens: Generation ends with any of these sequences. Tokens that may begin one are held back.
        include_prompt: Yield the prompt first.
        include_eos: Yield the stop sequence too.
        rng: Generator on the model's device to draw from; None: the global one.
        decoder: Feeds the model, for an own chunk size or a compiled step.
    """
    sampler = Sampler(temperature, top_k, top_p, min_p)
    tokens = token_stream(decoder or Decoder(model), prompt.unsqueeze(0), max_returned_tokens, sampler, rng)
    if include_prompt:
        yield prompt
    matcher, held = StopMatcher(stop_tokens), []
    for token in tokens:
        held.append(token)
        n_ready = matcher.push(token.item()) if matcher.sequences else 1
        yield from held[:n_ready]
        del held[:n_ready]
        if matcher.is_stopped:
            break
    if include_eos or not matcher.is_stopped:
        yield from held


@torch.inference_mode()
def batched_generate_fn(
    model: nn.Module,
    prompts: Tensor,
    max_returned_tokens: int,
    *,
    sample_args: list[dict] | dict,
    stop_tokens: tuple[list[int], ...] = (),
    include_prompt: bool,
    include_eos: bool,
    rng: torch.Generator | None = None,
) -> Iterator[list[Tensor | None]]:
    """Generate for B prompts of equal length at once; see `generate_fn`.

    Args:
        prompts: `(B, T)` token ids.
        sample_args: `temperature`, `top_k`, `top_p`, `min_p` for all rows, or a dict for each.

    Yields:
        Each step one entry a row: its tokens that became certain, `(n,)`, mostly one, or None.
    """
    B = prompts.size(0)
    settings = sample_args if isinstance(sample_args, list) else [sample_args] * B
    if len(settings) != B:
        raise ValueError(f"{B} prompts but {len(settings)} sets of sample_args: give one a prompt, or one for all")
    samplers = [Sampler(**kwargs) for kwargs in settings]
    tokens = token_stream(Decoder(model), prompts, max_returned_tokens, samplers, rng)
    if include_prompt:
        for column in prompts.unbind(1):
            yield list(column.split(1))
    matchers, held = [StopMatcher(stop_tokens) for _ in range(B)], [[] for _ in range(B)]
    for step in tokens:
        out: list[Tensor | None] = [None] * B
        values = step.tolist() if stop_tokens else [None] * B  # one wait for all rows
        for row, matcher in enumerate(matchers):
            if matcher.is_stopped:
                continue
            held[row].append(step[row : row + 1])
            n_ready = matcher.push(values[row]) if stop_tokens else 1
            if matcher.is_stopped and include_eos:
                n_ready = len(held[row])
            if n_ready:
                out[row] = torch.cat(held[row][:n_ready])
                del held[row][:n_ready]
        yield out
        if all(matcher.is_stopped for matcher in matchers):
            return
    rest = [None if m.is_stopped or not waiting else torch.cat(waiting) for m, waiting in zip(matchers, held)]
    if any(entry is not None for entry in rest):
        yield rest


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompt: Tensor,
    max_returned_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_id: int | None = None,
    include_prompt: bool = True,
    include_eos: bool = True,
    min_p: float = 0.0,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Token ids of the prompt `(T,)` with its continuation, up to and with `eos_id`; see `generate_fn`."""
    tokens = generate_fn(
        model, prompt, max_returned_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, rng=rng,
        stop_tokens=() if eos_id is None else ([eos_id],), include_prompt=include_prompt, include_eos=include_eos,
    )  # fmt: skip
    return torch.cat([prompt.new_empty(0), *tokens])


# ---------------------------------------------------------------- litgpt generate


Quantize = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]


def main(
    checkpoint_dir: Path,
    prompt: str = "What food do llamas eat?",
    *,
    sys_prompt: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    quantize: Quantize | None = None,
    precision: str | None = None,
    compile: bool = False,
    seed: int = 1234,
    min_p: float = 0.0,
    stream: bool = True,
    stop: list[str] | None = None,
) -> None:
    """Continue a prompt with a model. The text goes to stdout, everything else to stderr.

    Args:
        checkpoint_dir: Folder with the weights, model_config.yaml and the tokenizer, such as the final folder of a run.
        prompt: What to continue or answer.
        sys_prompt: System prompt, for prompt styles that have one.
        num_samples: How many texts to generate.
        max_new_tokens: Length of each text at most, in tokens, without the prompt.
        top_k: Draw only from the so many most likely tokens; null draws from all.
        top_p: Draw only from the fewest tokens whose probabilities add up to this; 1 draws from all.
        temperature: Below 1 makes the text more predictable, above 1 less; 0 always takes the most likely token.
        quantize: Keep the weights of the blocks in 4 bits (bnb.nf4 is the best of them, -dq a little smaller) or in 8.
        precision: 32-true, bf16-true, 16-true, bf16-mixed, 16-mixed or 64-true. Default: bf16-true where there is bf16.
        compile: Compile the decode step: slow to start, faster for long texts.
        seed: The same seed gives the same texts.
        min_p: Draw only from tokens with at least this share of the highest probability.
        stream: Print each piece of the text as soon as it is certain.
        stop: Strings that end the text; they are not printed.
    """
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    write_texts(
        checkpoint_dir, prompt, sampling, sys_prompt=sys_prompt, num_samples=num_samples, quantize=quantize,
        max_new_tokens=max_new_tokens, precision=precision, compile=compile, seed=seed, stream=stream, stop=stop,
    )  # fmt: skip


@torch.inference_mode()
def write_texts(
    checkpoint_dir: Path,
    prompt: str,
    sampling: dict[str, Any],
    *,
    load: Callable[..., nn.Module] | None = None,
    style_dir: Path | None = None,
    with_prompt: bool = True,
    sys_prompt: str | None = None,
    input: str = "",
    num_samples: int = 1,
    max_new_tokens: int = 50,
    quantize: str | None = None,
    precision: str | None = None,
    compile: bool = False,
    seed: int = 1234,
    stream: bool = True,
    stop: list[str] | None = None,
) -> None:
    """Under all commands that print texts; for what is not said here see `main`.

    Args:
        sampling: `temperature`, `top_k`, `top_p`, `min_p`.
        load: What gives the model instead of `load_model`, with the same arguments.
        style_dir: Folder whose prompt style goes before that of `checkpoint_dir`, where it has one.
        with_prompt: Print the prompt before the text.
        input: Further text for the prompt, in styles that have a place for it.
    """
    for name, count in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens)):
        if count < 1:
            raise ValueError(f"{name} {count} is below 1: there would be nothing to generate")
    Sampler(**sampling)  # refuses bad settings before anything is loaded
    checkpoint_dir = extend_checkpoint_dir(Path(checkpoint_dir))
    check_valid_checkpoint_dir(checkpoint_dir, ignore_tokenizer_files=True)
    device = default_device()
    dtype, autocast_dtype = parse_precision(precision)
    if quantize is not None:
        check_mode(quantize, precision, is_training=False)
        load_bitsandbytes()
    spec, config = load_checkpoint_config(checkpoint_dir)
    predict = own_predict(spec)
    tokenizer = Tokenizer(checkpoint_dir)
    styled = [folder for folder in (style_dir, checkpoint_dir) if folder is not None and has_prompt_style(folder)]
    style = load_prompt_style(styled[0]) if styled else PromptStyle.from_config(config)
    text = style.apply(prompt, sys_prompt=sys_prompt, **({"input": input} if input else {}))
    idx = tokenizer.encode(text, device=device).long()  # (T,)
    _check_prompt(idx, max_new_tokens, config, checkpoint_dir)
    start = time.perf_counter()
    model = (load or load_model)(spec, config, checkpoint_dir, device, dtype, quantize)
    _report(f"Time to load the model: {time.perf_counter() - start:.2f} s")

    rng = torch.Generator(device).manual_seed(seed)
    stop_tokens = style.stop_tokens(tokenizer)
    if predict is None and hasattr(model, "set_kv_cache"):
        model.set_kv_cache(batch_size=1, max_seq_length=len(idx) + max_new_tokens - 1)
    decoder = Decoder(model, step=CompiledStep(device) if compile else None)
    for n in range(num_samples):
        start = time.perf_counter()
        with autocast(device, autocast_dtype):
            if predict is None:
                tokens = generate_fn(
                    model, idx, len(idx) + max_new_tokens, **sampling, stop_tokens=stop_tokens, include_prompt=True,
                    include_eos=False, rng=rng, decoder=decoder,
                )  # fmt: skip
            else:
                tokens = predict(
                    model, idx, max_new_tokens=max_new_tokens, **sampling, rng=rng, eos_id=tokenizer.eos_id
                )
            n_new = _print_text(tokens, tokenizer, stop or [], stream, with_prompt)
        seconds = time.perf_counter() - start
        _report(f"Time for inference {n + 1}: {seconds:.2f} s in total, {n_new / seconds:.2f} tokens/s")
    if device.type == "cuda":
        _report(f"Memory used: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


def _check_prompt(idx: Tensor, max_new_tokens: int, config: Config, checkpoint_dir: Path) -> None:
    if len(idx) == 0:
        raise LengthError("the prompt is empty: its text gives no tokens, and this tokenizer adds no BOS")
    check_room(len(idx), len(idx) + max_new_tokens, config.block_size, "the model's context (block_size) is")
    if (largest := int(idx.max())) >= config.padded_vocab_size:
        raise ValueError(
            f"the tokenizer in {checkpoint_dir} gives the token {largest}, but the model knows only "
            f"{config.padded_vocab_size}: they do not belong together"
        )


def own_predict(spec: ModelSpec) -> Callable[..., Iterator[Tensor]] | None:
    """How a model that does not predict the next token generates, in the form of `generate_fn`; None for others."""
    objective = get_objective(spec.objective)
    if type(objective).predict is NextToken.predict:
        return None
    if type(objective).predict is Objective.predict:
        raise ValueError(f"the objective {spec.objective!r} of the model {spec.name!r} does not say how to generate")
    parameters = inspect.signature(objective.predict).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def predict(model: nn.Module, idx: Tensor, **settings: Any) -> Iterator[Tensor]:
        settings = {name: value for name, value in settings.items() if takes_all or name in parameters}
        yield idx
        out = objective.predict(model, idx.unsqueeze(0), **settings)
        yield from out["ids"][0, len(idx) : int(out["lengths"][0])].split(1)

    return predict


def _print_text(
    tokens: Iterator[Tensor], tokenizer: Tokenizer, stop: list[str], stream: bool, with_prompt: bool
) -> int:
    """Print prompt and answer; the first of `tokens` is the prompt. Returns the number of new tokens."""
    n_new = -1 if with_prompt else 0
    if not with_prompt:
        next(tokens)

    def counted() -> Iterator[Tensor]:
        nonlocal n_new
        for token in tokens:
            n_new += 1
            yield token

    def text() -> Iterator[str]:
        pieces = tokenizer.decode_stream(counted())
        for piece in pieces:
            if n_new > 0:  # stop strings count in the answer only
                yield from stop_at_text(itertools.chain([piece], pieces), stop)
                return
            yield piece

    for piece in text() if stream else ["".join(text())]:
        print(piece, end="", flush=True)
    print()
    return n_new


def _report(line: str) -> None:
    print(line, file=sys.stderr)
