"""Time of a prefill with a sliding window against the same model without one, in one run.

    python tests/benchmarks/sliding_window.py [--tokens 4096] [--window 1024] [--layers 3] [--rounds 9]

The width of SmolLM2-135M, few layers, the same weights on both sides; the sides take turns, the medians are compared.
Both kinds of prefill: without a cache, and into an empty one. Bar: the window costs at most 1.3 x (and should win).
"""

import argparse
import statistics
import sys
import time

import torch

from litgpt import GPT, Config

BAR = 1.3


def compare(args: argparse.Namespace, dtype: torch.dtype, cached: bool) -> float:
    """Median seconds with the window over those without."""
    sizes = dict(n_layer=args.layers, block_size=args.tokens)
    sides = {}
    for name, window in (("window", args.window), ("full", None)):
        torch.manual_seed(0)
        model = GPT(Config.from_name("SmolLM2-135M", **sizes, sliding_window_size=window)).to(dtype).eval()
        if cached:
            model.set_kv_cache(1)
        sides[name] = model
    idx = torch.randint(0, 49_000, (1, args.tokens))
    position = (torch.arange(args.tokens), args.tokens) if cached else ()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(args.rounds + 1):
        for name, model in sides.items():
            start = time.perf_counter()
            model(idx, *position, logits_to_keep=1)
            if i:  # the first round only warms up
                seconds[name].append(time.perf_counter() - start)
    window, full = (statistics.median(seconds[name]) for name in ("window", "full"))
    cache = "into the cache" if cached else "without cache"
    verdict = "ok" if window / full <= BAR else "ABOVE THE BAR"
    name = str(dtype).removeprefix("torch.")
    print(f"{name:<9} {cache:<15} window {window:6.3f} s   full {full:6.3f} s   ratio {window / full:.2f}  {verdict}")
    return window / full


@torch.no_grad()
def main() -> None:
    """Print a line for each precision and way, and exit 1 if one is above the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"T={args.tokens}, window {args.window}, {args.layers} layers, {args.threads} threads, bar {BAR}")
    ratios = [compare(args, dtype, cached) for dtype in (torch.float32, torch.bfloat16) for cached in (False, True)]
    sys.exit(max(ratios) > BAR)


if __name__ == "__main__":
    main()
