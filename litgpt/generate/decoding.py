"""The decode loop under everything that generates.

Letters in shapes: B batch, T tokens of the prompt, V vocabulary.
"""

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from litgpt.generate.sampling import Sampler
from litgpt.objective import accepts


class LengthError(ValueError, AssertionError, NotImplementedError):
    """Prompt, answer and context do not fit each other. The older types are those of litgpt 0.5."""


def decode_step(model: nn.Module, token: Tensor, input_pos: Tensor) -> Tensor:
    """Logits `(B, V)` after `token` `(B, 1)` at `input_pos` `(1,)`. All shapes are static, so it compiles once."""
    return model(token, input_pos)[:, -1]


class Decoder:
    """Feeds one batch of rows of equal length to a model and gives the logits after the last token.

    With a KV cache each token is fed once. A model whose `forward` takes no `input_pos` reads everything each time.

    Args:
        prefill_chunk_tokens: Longer prompts are fed in pieces of this size, which bounds the memory of activations.
        step: Replaces the decode step of a model with a KV cache, by a compiled one for example; see `decode_step`.
    """

    def __init__(
        self, model: nn.Module, prefill_chunk_tokens: int = 4096, step: Callable[..., Tensor] | None = None
    ) -> None:
        if prefill_chunk_tokens < 1:
            raise ValueError(f"prefill_chunk_tokens {prefill_chunk_tokens} is below 1")
        self.model, self.chunk, self.compiled_step = model, prefill_chunk_tokens, step
        self.has_cache = accepts(model, "input_pos")
        self.last_row = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
        self.has_maxp1 = accepts(model, "input_pos_maxp1")
        self.idx: Tensor | None = None
        self.input_pos: Tensor | None = None
        self.n_fed = 0

    def prefill(self, idx: Tensor) -> Tensor:
        """Logits `(B, V)` after the prompts `(B, T)`; forgets what was fed before."""
        self.n_fed, self.idx = 0, None
        if not self.has_cache:
            return self._feed(idx)
        for chunk in idx.split(self.chunk, dim=1):
            logits = self._feed(chunk)
        return logits

    def step(self, token: Tensor) -> Tensor:
        """Logits `(B, V)` after one more token a row, `(B,)`."""
        token = token.unsqueeze(1)  # (B, 1)
        if self.compiled_step is None or not self.has_cache:
            return self._feed(token)
        if self.input_pos is None:
            self.input_pos = torch.tensor([0], device=token.device)
        self.n_fed += 1
        return self.compiled_step(self.model, token, self.input_pos.fill_(self.n_fed - 1))

    def _feed(self, idx: Tensor) -> Tensor:
        if not self.has_cache:
            self.idx = idx if self.idx is None else torch.cat((self.idx, idx), dim=1)
            return self.model(self.idx, **self.last_row)[:, -1]
        start, self.n_fed = self.n_fed, self.n_fed + idx.size(1)
        # how far the cache is used: attention reads no more of it, and knows at prefill that it was empty
        used = {"input_pos_maxp1": self.n_fed} if self.has_maxp1 else {}
        input_pos = torch.arange(start, self.n_fed, device=idx.device)
        return self.model(idx, input_pos, **used, **self.last_row)[:, -1]


def token_stream(
    decoder: Decoder,
    prompts: Tensor,
    max_returned_tokens: int,
    samplers: Sampler | list[Sampler],
    rng: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The one loop under everything that generates: yields the next tokens `(B,)`, int64, of prompts `(B, T)`.

    Nothing is computed before it is asked for, and nothing here waits for the device.

    Args:
        max_returned_tokens: Length of a row at the end, the prompt included.
        samplers: For all rows, or one for each.
    """
    check_lengths(decoder.model, prompts.size(1), max_returned_tokens)
    if isinstance(samplers, list) and all(sampler == samplers[0] for sampler in samplers):
        samplers = samplers[0]
    logits = decoder.prefill(prompts)
    for n_left in range(max_returned_tokens - prompts.size(1), 0, -1):
        if isinstance(samplers, Sampler):
            tokens = samplers(logits, rng)
        else:
            tokens = torch.stack([sampler(row, rng) for sampler, row in zip(samplers, logits, strict=True)])
        yield tokens
        if n_left > 1:
            logits = decoder.step(tokens)


def check_lengths(model: nn.Module, n_prompt: int, max_returned_tokens: int) -> None:
    """Raise `LengthError` unless there is a prompt, room for an answer, and a context (or KV cache) for both."""
    if (n_slots := getattr(model, "_kv_cache_length", None)) is not None:
        check_room(n_prompt, max_returned_tokens, n_slots, "the KV cache (set_kv_cache) holds")
    else:
        limit = getattr(model, "max_seq_length", None) or getattr(getattr(model, "config", None), "block_size", None)
        check_room(n_prompt, max_returned_tokens, limit, "the model's context is")


def check_room(n_prompt: int, max_returned_tokens: int, limit: int | None, where: str) -> None:
    """Raise `LengthError` unless prompt and answer are there and fit; the message puts `where` before the limit."""
    if n_prompt == 0:
        raise LengthError("the prompt is empty: give at least one token, for example BOS")
    n_new = max_returned_tokens - n_prompt
    if n_new < 1:
        raise LengthError(
            f"max_returned_tokens {max_returned_tokens} leaves no room for new tokens: it counts the prompt, which has "
            f"{n_prompt}; raise it or shorten the prompt"
        )
    n_needed = max_returned_tokens - 1  # the last token is never fed
    if limit is not None and n_needed > limit:
        way_out = "shorten the prompt"
        if n_prompt <= limit:
            way_out += f" or ask for at most {limit + 1 - n_prompt} new tokens"
        raise LengthError(
            f"a prompt of {n_prompt} tokens and {n_new} new ones need {n_needed}, but {where} {limit}: {way_out}"
        )


class CompiledStep:
    """`decode_step` compiled; where that fails, a warning and the step as it is."""

    def __init__(self, device: torch.device) -> None:
        mode = "reduce-overhead" if device.type == "cuda" else None
        self._compiled: Callable[..., Tensor] | None = torch.compile(decode_step, dynamic=False, mode=mode)
        self._has_worked = False

    def __call__(self, model: nn.Module, token: Tensor, input_pos: Tensor) -> Tensor:
        if self._compiled is None:
            return decode_step(model, token, input_pos)
        try:
            logits = self._compiled(model, token, input_pos)
        except Exception as error:  # compilers fail in many ways; one that has worked once does not
            if self._has_worked:
                raise
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"the decode step runs uncompiled: {type(error).__name__}: {reason}", stacklevel=2)
            self._compiled = None
            return decode_step(model, token, input_pos)
        self._has_worked = True
        return logits
