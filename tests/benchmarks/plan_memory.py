"""`litgpt plan` against memory measured in training steps and in generation, on the CPU.

    python tests/benchmarks/plan_memory.py [NAME ...]

Measured is what torch's allocator hands out, event by event (`torch.profiler`), temporary memory of kernels included:
the most that was in use at once in three steps, weights, gradients and optimizer included. Bar: within 10 %.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from litgpt.config import Config
from litgpt.generate.decoding import Decoder
from litgpt.model import GPT, Block
from litgpt.objective import NextToken
from litgpt.optimizers import build_optimizer
from litgpt.plan import RunSettings, plan_run

TOLERANCE = 0.1
LLAMA = dict(
    n_layer=4, n_embd=128, n_head=8, n_query_groups=2, intermediate_size=384, block_size=8192, padded_vocab_size=2048,
    norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", parallel_residual=False, bias=False, rotary_percentage=1.0,
)  # fmt: skip
NEOX = dict(n_layer=3, n_embd=256, n_head=4, padded_vocab_size=2048)
LATENT = dict(q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32)
MOE = LLAMA | dict(mlp_class_name="LLaMAMoE", n_expert=8, n_expert_per_token=2, moe_intermediate_size=256)
DEEPSEEK = MOE | dict(
    n_query_groups=8, latent_attention=LATENT, n_expert_groups=2, n_topk_groups=1, n_shared_expert=1,
    first_k_dense_replace=1,
)  # fmt: skip
GEMMA = LLAMA | dict(
    mlp_class_name="GemmaMLP", norm_unit_offset=True, post_attention_norm=True, post_mlp_norm=True, tie_embeddings=True,
    scale_embeddings=True, attention_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window_size=256,
    sliding_window_indices=[1, 0, 1, 0],
)  # fmt: skip


@dataclass
class Recipe:
    """One run: a model and its settings."""

    config: dict
    settings: RunSettings


def recipe(config: dict, task: str, batch_size: int, seq_length: int, precision: str, **more: object) -> Recipe:
    """With the settings of the CPU."""
    return Recipe(config, RunSettings(task, batch_size, seq_length, precision, device="cpu", **more))


RECIPES = {
    "pretrain neox 32-true AdamW": recipe(NEOX, "pretrain", 2, 512, "32-true"),
    "pretrain neox small batch": recipe(NEOX, "pretrain", 1, 64, "32-true"),
    "pretrain llama gqa tied bf16-mixed": recipe(LLAMA | dict(tie_embeddings=True), "pretrain", 4, 512, "bf16-mixed"),
    "pretrain llama bf16-mixed, no accumulation": recipe(LLAMA, "pretrain", 1, 256, "bf16-mixed", accumulate=False),
    "pretrain llama bf16-true": recipe(LLAMA, "pretrain", 2, 1024, "bf16-true"),
    "pretrain llama Muon": recipe(LLAMA | dict(n_embd=512, n_layer=2, intermediate_size=1536), "pretrain", 1, 128,
                                  "32-true", optimizer="Muon", accumulate=False),
    "pretrain MoE bf16-mixed": recipe(MOE, "pretrain", 2, 512, "bf16-mixed"),
    "pretrain DeepSeek (MLA, MoE) 32-true": recipe(DEEPSEEK, "pretrain", 2, 512, "32-true"),
    "pretrain Gemma-2-like 32-true": recipe(GEMMA, "pretrain", 1, 1024, "32-true"),
    "pretrain long context, big vocabulary": recipe(LLAMA | dict(n_layer=2, padded_vocab_size=32000), "pretrain", 1,
                                                    2048, "32-true"),
    "pretrain with dropout bf16-mixed": recipe(LLAMA | dict(dropout=0.1), "pretrain", 2, 512, "bf16-mixed"),
    "full, checkpointing, bf16-mixed": recipe(LLAMA | dict(n_layer=8), "full", 4, 512, "bf16-mixed",
                                              activation_checkpointing=True),
    "lora bf16-mixed": recipe(LLAMA, "lora", 2, 512, "bf16-mixed"),
    "lora bf16-true, dropout 0": recipe(LLAMA, "lora", 2, 1024, "bf16-true", lora_dropout=0.0),
    "generate bf16-true": recipe(LLAMA | dict(n_layer=8), "generate", 4, 2048, "bf16-true"),
    "generate window + MLA 32-true": recipe(DEEPSEEK, "generate", 2, 1024, "32-true"),
    "generate Gemma-2-like bf16-true": recipe(GEMMA, "generate", 2, 1024, "bf16-true"),
    "generate bf16-mixed": recipe(LLAMA, "generate", 1, 1024, "bf16-mixed"),
}  # fmt: skip


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank product on some of its outputs, wrapped by hand."""

    def __init__(self, linear: nn.Linear, r: int, columns: list[slice], dropout: float) -> None:
        super().__init__()
        n_out, like = sum(c.stop - c.start for c in columns), dict(dtype=linear.weight.dtype)
        self.linear, self.columns, self.dropout, self.r = linear, columns, dropout, r
        self.lora_A = nn.Parameter(torch.randn(r * len(columns), linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(n_out, r, **like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        low = F.linear(F.dropout(x, self.dropout), self.lora_A).split(self.r, dim=-1)  # one a part: (B, T, r)
        weights = self.lora_B.split([c.stop - c.start for c in self.columns])
        parts = dict(zip((c.start for c in self.columns), (F.linear(a, w) for a, w in zip(low, weights)), strict=True))
        delta, start = [], 0
        for column in self.columns:
            if column.start > start:
                delta.append(y.new_zeros(*y.shape[:-1], column.start - start))
            delta.append(parts[column.start] * 2.0)
            start = column.stop
        return y + torch.cat(delta, dim=-1)


class CheckpointedBlock(Block):
    """Keeps its input alone."""

    def forward(self, *args: object) -> torch.Tensor:
        return checkpoint(super().forward, *args, use_reentrant=False)


class CheckpointedGPT(GPT):
    """Runs each block again in the backward pass."""

    block_class = CheckpointedBlock


def build(recipe: Recipe) -> nn.Module:
    """The model of a recipe as its command has it."""
    config, s = Config(**recipe.config), recipe.settings
    model = (CheckpointedGPT if s.activation_checkpointing else GPT)(config)
    if s.resolved_precision == "bf16-true":
        model = model.to(torch.bfloat16)
    if s.task == "lora":
        model.requires_grad_(False)
        n_q, n_k = config.n_head * config.head_size, config.n_query_groups * config.head_size
        columns = [slice(0, n_q), slice(n_q + n_k, n_q + 2 * n_k)]
        for block in model.transformer.h:
            block.attn.qkv = LoRALinear(block.attn.qkv, s.lora_r, columns, s.lora_dropout)
    return model


def run(recipe: Recipe) -> None:
    """Three optimizer steps, or a prompt and three new tokens."""
    s, model = recipe.settings, build(recipe)
    torch.empty(1, dtype=torch.uint8)  # what building took does not count
    is_mixed = s.resolved_precision == "bf16-mixed"
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if is_mixed else contextlib.nullcontext()
    vocab_size = model.config.padded_vocab_size
    if s.task == "generate":
        model.eval().set_kv_cache(s.batch_size, s.seq_length)
        decoder = Decoder(model)
        with torch.inference_mode(), autocast:
            logits = decoder.prefill(torch.randint(vocab_size, (s.batch_size, s.seq_length - 3)))
            for _ in range(3):
                logits = decoder.step(logits.float().argmax(dim=-1))
        return
    optimizer, objective = build_optimizer(s.optimizer, model), NextToken()
    for _ in range(3):
        for _ in range(2 if s.accumulate else 1):
            rows = [{"input_ids": torch.randint(vocab_size, (s.seq_length + 1,))} for _ in range(s.batch_size)]
            batch = objective.collate(rows, "train", torch.Generator())
            with autocast:
                out = objective.loss(model, batch)
            (out["loss"] / out["n"]).backward()
            del out
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def allocations(function: Callable[[], object]) -> list[int]:
    """Bytes that torch's allocator gave out (or, negative, took back) while `function` ran, in their order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events, found = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events.extend(event.children)
        if hasattr(event.extra_fields, "alloc_size"):
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [size for _, size in sorted(found, key=lambda pair: pair[0])]


def measure(recipe: Recipe) -> int:
    """Most bytes in use at once after the model was built, which an allocation of one byte tells."""
    in_use = peak = 0
    for size in allocations(lambda: run(recipe)):
        in_use += size
        peak = 0 if size == 1 else max(peak, in_use)
    return peak


def predict(recipe: Recipe) -> int:
    """What `litgpt plan` says."""
    return plan_run(Config(**recipe.config), recipe.settings).total


def main() -> None:
    """Print a row for each recipe, and exit 1 if one is above the bar."""
    worst = 0.0
    print(f"{'recipe':<44}{'predicted MB':>13}{'measured MB':>13}{'ratio':>8}")
    for name, recipe in RECIPES.items():
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        predicted, measured = predict(recipe), measure(recipe)
        worst = max(worst, abs(predicted / measured - 1))
        print(f"{name:<44}{predicted / 1e6:>13.2f}{measured / 1e6:>13.2f}{predicted / measured:>8.3f}", flush=True)
    print(f"worst: {worst:.1%} off; bar {TOLERANCE:.0%}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
