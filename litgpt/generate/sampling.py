"""From logits to the next token.

Letters in shapes: B batch, V vocabulary, K candidates left after top-k.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """Draws tokens from logits. In this order: top-k, temperature, top-p, min-p.

    Raises:
        ValueError: A setting is out of its range.
    """

    temperature: float = 1.0
    """Divides the logits: below 1 sharper, above 1 flatter, 0 takes the most likely token."""
    top_k: int | None = None
    """Keep only the so many most likely tokens; None keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities add up to this (arXiv 1904.09751); 0 takes the most likely one."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the highest probability (arXiv 2407.01082)."""

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf):
            raise ValueError(f"temperature {self.temperature} is negative or not finite; 0 takes the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} is below 1; null keeps all tokens")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is outside [0, 1]; 1 keeps all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} is outside [0, 1]; 0 keeps all tokens")

    def __call__(self, logits: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Token ids `(...)`, int64, from logits `(..., V)`; never waits for the device."""
        if self.temperature == 0 or self.top_p == 0:
            return logits.argmax(dim=-1)
        logits, ids = self.candidates(logits)  # (..., K)
        chosen = draw(logits.softmax(dim=-1), rng)
        return chosen if ids is None else ids.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is left to draw from: logits `(..., K)` in float32 and their ids, or None where K = V in order."""
        logits, ids = logits.float(), None
        if self.top_k is not None and self.top_k < logits.size(-1):
            logits, ids = logits.topk(self.top_k)
        # the highest becomes 0, so that a tiny temperature does not overflow
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_p < 1:
            if ids is None:
                logits, ids = logits.sort(dim=-1, descending=True)
            logits = logits.masked_fill(_is_beyond(logits, self.top_p), -math.inf)
        if self.min_p > 0:
            logits = logits.masked_fill(logits < math.log(self.min_p), -math.inf)
        return logits, ids


def draw(probs: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Index `(...)` drawn from probabilities `(..., V)`, which need not add up to 1.

    An exponential race: unlike `torch.multinomial` it neither waits for the device nor breaks a compiled graph.
    """
    return (probs / torch.empty_like(probs).exponential_(generator=rng)).argmax(dim=-1)


def sample_top_p(logits: Tensor, top_p: float) -> Tensor:
    """The logits `(..., V)` with -inf outside of the fewest tokens whose probabilities add up to `top_p`."""
    falling, ids = logits.sort(dim=-1, descending=True)
    is_beyond = torch.zeros_like(ids, dtype=torch.bool).scatter(-1, ids, _is_beyond(falling, top_p))
    return logits.masked_fill(is_beyond, -math.inf)


def _is_beyond(falling: Tensor, top_p: float) -> Tensor:
    """Which of the logits `(..., V)`, sorted from the highest, are not needed to reach `top_p`. The first always is."""
    probs = falling.float().softmax(dim=-1)
    beyond = probs.cumsum(dim=-1) - probs >= top_p
    beyond[..., 0] = False
    return beyond
