"""Non-padding tokens/s of packed batches against random-order batches of 8 padded to their longest, in one run.

    python tests/benchmarks/packing.py [--data alpaca.json --tokenizer DIR_OR_SENTENCEPIECE_FILE] [--profile]

One tiny Llama (about 10M parameters) is trained on both, with AdamW and clipping at 1.0. Packed batches have as many
tokens as the padded ones hold on average, padding included; their documents neither see nor predict each other. The
sides alternate step by step. `grouped` are padded batches of 8 of similar length; `one text` is the packed batch
without `segment_ids`, which is wrong as training and shows what the borders of the documents cost. Without --data the
lengths are drawn from a distribution like that of Alpaca with its prompt. --profile says where each side's time goes.

Seconds of CPU are printed beside those of the clock: on a machine that others use, trust the former (with one thread).
"""

import argparse
import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from litgpt import GPT, Config
from litgpt.data.batching import ExampleLoader
from litgpt.data.tokenized import TokenizedExamples
from litgpt.objective import NextToken
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer

BATCH = 8
SIDES = ["padded", "packed", "grouped", "one text"]


def synthetic_examples(n: int, vocab_size: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens; a prompt of about 60, an answer whose length spreads widely."""
    rng = np.random.default_rng(0)
    prompts, answers = rng.lognormal(4.05, 0.22, n), rng.lognormal(3.9, 0.95, n)
    examples = []
    for prompt, length in zip(prompts.astype(int), (prompts + answers).astype(int).clip(max=512)):
        ids = torch.from_numpy(rng.integers(3, vocab_size, length))
        labels = ids.clone()
        labels[:prompt] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def read_examples(path: Path, tokenizer_path: Path) -> TokenizedExamples:
    """An instruction file with the Alpaca prompt; loss on the answers."""
    if tokenizer_path.is_dir():
        tokenizer = Tokenizer(tokenizer_path)
        encode_text = lambda text, eos: tokenizer.encode(text, eos=eos).tolist()  # noqa: E731
    else:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(str(tokenizer_path))
        encode_text = lambda text, eos: processor.encode(text, add_eos=eos)  # noqa: E731
    style = PromptStyle.from_name("alpaca")

    def encode(sample: dict[str, str]) -> dict[str, torch.Tensor]:
        prompt = encode_text(style.apply(sample["instruction"], input=sample.get("input", "")), False)
        ids = torch.tensor((prompt + encode_text(sample["output"], True))[:512])
        labels = ids.clone()
        labels[: len(prompt)] = -100
        return {"input_ids": ids, "labels": labels}

    return TokenizedExamples(json.loads(path.read_text("utf-8")), encode, None)


def batches(examples, borders: bool = True, **settings) -> Iterator[dict]:
    """Batches without end, as the finetuning loop makes them, with the number of tokens that are no padding."""
    loader = ExampleLoader(examples, rank=0, world=1, collate_fn=list, **settings)
    while True:
        for rows in loader:
            batch = NextToken().collate(rows, "train", torch.Generator())
            if not borders:
                del batch["segment_ids"]
            yield {**batch, "n_real": sum(len(row["input_ids"]) - 1 for row in rows)}


class Side:
    """A model of its own, trained on one kind of batches."""

    def __init__(self, config: Config, stream: Iterator[dict], precision: str) -> None:
        torch.manual_seed(0)
        self.model = GPT(config)
        self.model.init_weights()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.stream, self.objective = stream, NextToken()
        mixed = precision == "bf16-mixed"
        self.cast = torch.autocast("cpu", dtype=torch.bfloat16) if mixed else contextlib.nullcontext()
        self.real = self.all = 0
        self.seconds: dict[str, float] = defaultdict(float)

    def step(self, record: bool = True) -> None:
        batch = next(self.stream)
        real = batch.pop("n_real")
        clock, cpu = time.perf_counter(), time.process_time()
        marks = [clock]
        with self.cast:
            out = self.objective.loss(self.model, batch)
        marks.append(time.perf_counter())
        (out["loss"] / out["n"]).backward()
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
        if record:
            self.seconds["clock"] += marks[-1] - clock
            self.seconds["cpu"] += time.process_time() - cpu
            for name, start, end in zip(("forward", "backward", "optimizer"), marks, marks[1:]):
                self.seconds[name] += end - start
            self.real += real
            self.all += batch["input_ids"].numel()


def profile(side: Side, n_steps: int) -> None:
    """The operators with the most time of their own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        for _ in range(n_steps):
            side.step(record=False)
    rows = sorted(run.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    for row in rows[:12]:
        print(f"  {row.self_cpu_time_total / total:6.1%} {row.count / n_steps:8.0f} calls  {row.key}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--row", type=int, default=512, help="tokens of a packed row (max_seq_length)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16-mixed"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--window", type=int, help="give the layers a sliding window")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES, help="the first is the measure")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.data:
        examples, vocab_size = read_examples(args.data, args.tokenizer), 32000
    else:
        vocab_size = 8192
        examples = synthetic_examples(2000, vocab_size)
    lengths = [len(example["input_ids"]) for example in examples]
    random_batches = batches(examples, batch_size=BATCH)
    budget = np.mean([next(random_batches)["input_ids"].numel() for _ in range(len(examples) // BATCH)])
    n_rows = max(1, round(budget / args.row))
    config = Config(
        name="tiny-llama", n_layer=6, n_embd=256, n_head=8, n_query_groups=4, intermediate_size=704,
        block_size=max(2048, 2 * n_rows * args.row), vocab_size=vocab_size, padded_vocab_size=vocab_size,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", bias=False, rotary_percentage=1.0, tie_embeddings=True,
        sliding_window_size=args.window,
    )  # fmt: skip
    packed = dict(batch_size=n_rows, pack_into=args.row)
    streams = {
        "padded": batches(examples, batch_size=BATCH),
        "packed": batches(examples, **packed),
        "grouped": batches(examples, batch_size=BATCH, group_by_length=True),
        "one text": batches(examples, borders=False, **packed),
    }
    sides = {name: Side(config, streams[name], args.precision) for name in args.sides}
    n_parameters = sum(p.numel() for p in sides[args.sides[0]].model.parameters())
    print(
        f"{len(examples):,} examples of {np.mean(lengths):.0f} tokens (median {np.median(lengths):.0f}, longest "
        f"{max(lengths)}); {n_parameters / 1e6:.1f}M parameters; {args.precision}, {args.threads} threads; padded "
        f"batches of {budget:,.0f} tokens, packed ones of {n_rows} rows of {args.row}"
    )
    for step in range(args.steps + 3):
        for side in sides.values():
            side.step(record=step >= 3)
    print("side       padding   tokens/s   per CPU second   ratio (clock, CPU)   forward backward optimizer ms/step")
    base = sides[args.sides[0]]
    for name, side in sides.items():
        speed = {kind: side.real / side.seconds[kind] for kind in ("clock", "cpu")}
        ratio = [speed[kind] / (base.real / base.seconds[kind]) for kind in speed]
        parts = "  ".join(f"{side.seconds[p] / args.steps * 1000:7.1f}" for p in ("forward", "backward", "optimizer"))
        print(
            f"{name:9}  {1 - side.real / side.all:7.1%}  {speed['clock']:9,.0f}  {speed['cpu']:15,.0f}   "
            f"{ratio[0]:9.2f} {ratio[1]:6.2f}       {parts}"
        )
    if args.profile:
        for name, side in sides.items():
            print(f"\n{name}: share of time, calls per step")
            profile(side, 5)


if __name__ == "__main__":
    main()
