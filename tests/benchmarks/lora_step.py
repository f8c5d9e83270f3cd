"""LoRA step: tokens/s and peak memory of our model against transformers + peft with the same shape, in one run.

    python tests/benchmarks/lora_step.py [--shape pythia-160m] [--layers qv|all] [--precision bf16-mixed] [--rounds 7]

Both sides train rank 8 updates of the same layers with AdamW on the same random tokens, B=2, T=256, random weights. On
GPT-NeoX, whose projection is fused, peft updates queries, keys and values at once for `qv`; ours queries and values.
The sides alternate, the medians of the rounds are compared. Memory is the peak of a process of its own for each side,
less what the process had before the model (see `training_step.py`); these processes come first, because Linux lets the
peak of the process that starts another count for that one too.
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
from training_step import build_theirs

B, T, R = 2, 256, 8
NAMES = {"pythia-160m": "pythia-160m", "smollm2-135m": "SmolLM2-135M"}
PEFT_LAYERS = {
    ("pythia-160m", "qv"): ["query_key_value"],
    ("pythia-160m", "all"): ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ("smollm2-135m", "qv"): ["q_proj", "v_proj"],
    ("smollm2-135m", "all"): ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def build_ours(shape: str, layers: str, mixed: bool):
    from litgpt import GPT, Config
    from litgpt.lora import LoRASettings, add_lora, mark_only_lora_as_trainable
    from litgpt.surgery import cast_frozen

    model = GPT(Config.from_name(NAMES[shape], block_size=T))
    model.init_weights()
    every = layers == "all"
    add_lora(model, LoRASettings(r=R, alpha=16, dropout=0.0, key=every, projection=every, mlp=every))
    mark_only_lora_as_trainable(model)
    if mixed:
        cast_frozen(model, torch.bfloat16)

    def loss_of(model, idx, targets):
        total, n = model(idx, targets=targets)
        return total / n

    return model, loss_of


def build_peft(shape: str, layers: str):
    from peft import LoraConfig, get_peft_model

    model, _, loss_of = build_theirs(shape, fused=False)
    lora = LoraConfig(r=R, lora_alpha=16, lora_dropout=0.0, target_modules=PEFT_LAYERS[shape, layers])
    return get_peft_model(model, lora), loss_of


class Side:
    def __init__(self, who: str, shape: str, layers: str, precision: str) -> None:
        torch.manual_seed(0)
        mixed = precision == "bf16-mixed"
        self.model, loss_of = build_ours(shape, layers, mixed) if who == "ours" else build_peft(shape, layers)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.n_trained = sum(p.numel() for p in trained)
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def step(idx: torch.Tensor) -> float:
            with torch.autocast("cpu", dtype=torch.bfloat16) if mixed else contextlib.nullcontext():
                loss = loss_of(self.model, idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        self.step = step


def memory_of(who: str, args: argparse.Namespace) -> float:
    """Peak MB of three steps in a process of its own, above what its imports took."""
    command = [sys.executable, __file__, "--memory-of", who, "--shape", args.shape, "--layers", args.layers]
    command += ["--precision", args.precision, "--threads", str(args.threads)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "200000"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="pythia-160m", choices=[*NAMES])
    parser.add_argument("--layers", default="qv", choices=["qv", "all"])
    parser.add_argument("--precision", default="bf16-mixed", choices=["fp32", "bf16-mixed"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    idx = torch.randint(0, 49000, (B, T + 1), generator=torch.Generator().manual_seed(1))
    how = args.shape, args.layers, args.precision

    if args.memory_of:
        import peft  # noqa: F401  (its weight counts on neither side)

        import litgpt.lora  # noqa: F401

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        side = Side(args.memory_of, *how)
        for _ in range(3):
            side.step(idx)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return

    print(f"{args.shape} {args.layers} {args.precision}, {args.threads} threads")
    if not args.no_memory:
        memory = {name: memory_of(name, args) for name in ("ours", "peft")}
        print(f"memory    {memory['ours']:.0f} / {memory['peft']:.0f} MB = {memory['ours'] / memory['peft']:.2f} x")
    sides = {name: Side(name, *how) for name in ("ours", "peft")}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side.step(idx), side.step(idx)
    for _ in range(args.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side.step(idx)
            seconds[name].append(time.perf_counter() - start)
    speed = {name: B * T / statistics.median(found) for name, found in seconds.items()}
    print("trained   " + "  ".join(f"{name} {side.n_trained:,}" for name, side in sides.items()))
    print("tokens/s  " + "  ".join(f"{name} {value:.0f}" for name, value in speed.items()))
    print(f"speed     {speed['ours'] / speed['peft']:.2f} x")


if __name__ == "__main__":
    main()
