"""Peak memory of a long context: prefill and 64 decode steps at 131,072 tokens, against KV cache and weights.

    python tests/benchmarks/long_context.py [--context 131072] [--only NAME ...] [--dtype float32]

Each kind of model, and each way of prefilling (whole, or in chunks), runs in a process of its own; memory is the peak
of that process less what it had when everything was imported and torch had run once. Bar: at most KV cache + weights +
200 MB. Without a window a prefill takes minutes on a CPU: its arithmetic, not its memory, grows with the square.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

BAR_MB = 200
DECODE_STEPS = 64
SIZES = dict(
    n_layer=1, n_embd=128, n_head=4, n_query_groups=2, intermediate_size=256, vocab_size=1024, padded_vocab_size=1024,
    norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", parallel_residual=False, bias=False, rotary_percentage=1.0,
)  # fmt: skip
LATENT = dict(q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32)
KINDS: dict[str, dict] = {
    "plain": {},
    "window": dict(sliding_window_size=4096),
    "softcap": dict(attention_logit_softcapping=50.0),
    "window+softcap": dict(sliding_window_size=4096, attention_logit_softcapping=50.0),
    "mla": dict(latent_attention=LATENT, n_query_groups=4, rope_interleave=True),
}
WAYS = {"whole": None, "chunks": 4096}


def megabytes_in_use_at_peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(kind: str, chunk: int | None, context: int, dtype_name: str) -> dict[str, float]:
    """One run in this process: seconds, and megabytes for what is measured and what is unavoidable."""
    import torch

    from litgpt import GPT, Config

    torch.set_grad_enabled(False)
    dtype = getattr(torch, dtype_name)
    warm = torch.randn(64, 64).to(dtype)
    (warm @ warm).softmax(dim=-1)
    before = megabytes_in_use_at_peak()
    model = GPT(Config(**SIZES | KINDS[kind], block_size=context)).to(dtype).eval()
    model.set_kv_cache(1)
    idx = torch.randint(0, 1000, (1, context))
    n_prompt = context - DECODE_STEPS
    start = time.perf_counter()
    for i in range(0, n_prompt, chunk or n_prompt):
        end = min(i + (chunk or n_prompt), n_prompt)
        model(idx[:, i:end], torch.arange(i, end), end, logits_to_keep=1)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for i in range(n_prompt, context):
        logits = model(idx[:, i : i + 1], torch.tensor([i]), i + 1)
    decode = time.perf_counter() - start
    assert logits.shape == (1, 1, 1024) and logits.isfinite().all()
    size_of = lambda tensors: sum(t.numel() * t.element_size() for t in tensors) / 2**20  # noqa: E731
    return {
        "peak": megabytes_in_use_at_peak() - before,
        "cache": size_of(buffer for name, buffer in model.named_buffers() if "kv_cache" in name),
        "weights": size_of(model.parameters()),
        "prefill": prefill,
        "decode": decode / DECODE_STEPS,
    }


def main() -> None:
    """Run each kind both ways, print a table, and exit 1 if one is above the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=131_072)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(args.run[0], WAYS[args.run[1]], args.context, args.dtype)))
        return
    print(f"context {args.context:,}, {args.dtype}; MB above start; bar = cache + weights + {BAR_MB}")
    print(f"{'model':<16}{'prefill':<9}{'peak':>7}{'cache':>7}{'weights':>9}{'rest':>6}{'prefill s':>11}{'ms/step':>9}")
    worst = 0.0
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    for kind in args.only:
        for way in args.ways:
            command = [sys.executable, __file__, "--run", kind, way, "--context", str(args.context)]
            command += ["--dtype", args.dtype]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            r = json.loads(out.splitlines()[-1])
            rest = r["peak"] - r["cache"] - r["weights"]
            worst = max(worst, rest)
            print(
                f"{kind:<16}{way:<9}{r['peak']:>7.0f}{r['cache']:>7.0f}{r['weights']:>9.1f}{rest:>6.0f}"
                f"{r['prefill']:>11.1f}{1000 * r['decode']:>9.1f}  {'ok' if rest <= BAR_MB else 'ABOVE THE BAR'}",
                flush=True,
            )
    print(f"worst: {worst:.0f} MB beside cache and weights, {BAR_MB - worst:+.0f} MB to the bar")
    sys.exit(worst > BAR_MB)


if __name__ == "__main__":
    main()
