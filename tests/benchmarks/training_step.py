"""Training tokens/s and peak memory of our model against the transformers model of the same shape, in one run.

    python tests/benchmarks/training_step.py [--shape pythia-160m] [--precision bf16-mixed] [--compile] [--rounds 7]

Both sides train the same shape with random weights on the same random tokens: AdamW, clipping at 1.0, B=2, T=256. The
sides alternate, the medians of the rounds are compared. The transformers side runs with torch's default AdamW, as its
users write it, and once more with the fused one, so that what the optimizer brings is seen apart. Memory is the peak of
a process of its own for each side, less what the process had before the model; large blocks go back to the system when
they are freed, so that the holes which glibc's heap leaves (200 to 450 MB on either side, by luck) do not count.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch

B, T = 2, 256


def build_ours(shape: str):
    from litgpt import GPT, Config

    name = {"pythia-160m": "pythia-160m", "smollm2-135m": "SmolLM2-135M"}[shape]
    model = GPT(Config.from_name(name, block_size=T))
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def loss_of(model, idx, targets):
        total, n = model(idx, targets=targets)
        return total / n

    return model, optimizer, loss_of


def build_theirs(shape: str, fused: bool):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    if shape == "pythia-160m":
        config = GPTNeoXConfig(
            vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            max_position_embeddings=T, use_cache=False
        )  # fmt: skip
        model = GPTNeoXForCausalLM(config)
    else:
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            intermediate_size=1536, max_position_embeddings=T, tie_word_embeddings=True, use_cache=False
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True if fused else None)

    def loss_of(model, idx, targets):
        return model(input_ids=idx, labels=idx).loss

    return model, optimizer, loss_of


class Side:
    def __init__(self, who: str, shape: str, precision: str, compiled: bool) -> None:
        torch.manual_seed(0)
        self.model, self.optimizer, loss_of = (
            build_ours(shape) if who == "ours" else build_theirs(shape, fused=who == "theirs-fused")
        )
        self.model.train()
        run = torch.compile(self.model) if compiled else self.model
        self.parameters = list(self.model.parameters())
        mixed = precision == "bf16-mixed"
        cast = torch.autocast("cpu", dtype=torch.bfloat16) if mixed else contextlib.nullcontext()

        def step(idx: torch.Tensor) -> float:
            with cast:
                loss = loss_of(run, idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss.item()

        self.step = step


def memory_of(who: str, args: argparse.Namespace) -> float:
    """Peak MB of three steps in a process of its own, above what its imports took."""
    command = [sys.executable, __file__, "--memory-of", who, "--shape", args.shape, "--precision", args.precision]
    command += ["--threads", str(args.threads), *(["--compile"] if args.compile else [])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "200000"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="pythia-160m", choices=["pythia-160m", "smollm2-135m"])
    parser.add_argument("--precision", default="bf16-mixed", choices=["fp32", "bf16-mixed"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    idx = torch.randint(0, 49000, (B, T + 1), generator=torch.Generator().manual_seed(1))

    if args.memory_of:
        import transformers  # noqa: F401  (its weight counts on neither side)

        import litgpt.model  # noqa: F401

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        side = Side(args.memory_of, args.shape, args.precision, args.compile)
        for _ in range(3):
            side.step(idx)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return

    names = ["ours", "theirs", "theirs-fused"]
    # before anything large is built here: Linux counts the peak of the parent for the child
    memory = {} if args.no_memory else {name: memory_of(name, args) for name in names[:2]}
    sides = {name: Side(name, args.shape, args.precision, args.compile) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for side in sides.values():
        side.step(idx), side.step(idx)
    for _ in range(args.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side.step(idx)
            seconds[name].append(time.perf_counter() - start)
    speed = {name: B * T / statistics.median(s) for name, s in seconds.items()}
    flops = sides["ours"].model.get_nparams_and_flops(T).flops_per_token * speed["ours"]
    plain, fused = speed["ours"] / speed["theirs"], speed["ours"] / speed["theirs-fused"]
    print(f"{args.shape} {args.precision} {'compiled' if args.compile else 'eager'}, {args.threads} threads")
    print("tokens/s  " + "  ".join(f"{name} {value:.0f}" for name, value in speed.items()))
    print(f"ours      {flops / 1e9:.0f} GFLOP/s")
    print(f"speed     {plain:.2f} x, {fused:.2f} x with theirs fused")
    if memory:
        print(f"memory    {memory['ours']:.0f} / {memory['theirs']:.0f} MB = {memory['ours'] / memory['theirs']:.2f} x")


if __name__ == "__main__":
    main()
