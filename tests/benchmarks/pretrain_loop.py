"""What the training loop of `litgpt pretrain` costs: its tokens/s against a bare loop over the same model, alternating.

    python tests/benchmarks/pretrain_loop.py [--precision bf16-mixed] [--rounds 7]

Both train the model of the quickstart with fused AdamW and clipping on the same text. A round of `litgpt pretrain` is a
run of its own, logging every step, of which the median step after the first three counts. Bar: within 5 %.
"""

import argparse
import contextlib
import csv
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch

from litgpt import pretrain, quickstart
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.python_docs import PythonDocs
from litgpt.model import GPT
from litgpt.tokenizer_training import train_tokenizer

BATCH, CONTEXT, SKIP = 16, quickstart.CONTEXT, 3


def loop_of_ours(out_dir: Path, tokenizer_dir: Path, precision: str, steps: int) -> float:
    train = TrainArgs(
        save_interval=None, log_interval=1, global_batch_size=BATCH, micro_batch_size=BATCH, max_tokens=10**12,
        max_steps=steps, max_seq_length=CONTEXT, max_norm=1.0, lr_warmup_steps=0
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pretrain.setup(
            model_config=quickstart.build_config(), out_dir=out_dir, precision=precision, data=PythonDocs(),
            train=train, eval=EvalArgs(interval=10**6, final_validation=False), devices=1,
            tokenizer_dir=tokenizer_dir, logger_name="csv", plot=False
        )  # fmt: skip
    with open(out_dir / "metrics.csv") as file:
        return statistics.median(float(row["iter_time"]) for row in list(csv.DictReader(file))[SKIP:])


def bare_loop(batches: list[torch.Tensor], precision: str, steps: int) -> float:
    model = GPT(quickstart.build_config())
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    cast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    seconds = []
    for i in range(steps):
        start, batch = time.perf_counter(), batches[i % len(batches)]
        with cast:
            total, n = model(batch[:, :-1], targets=batch[:, 1:])
            loss = total / n
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[SKIP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16-mixed", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    batches = list(torch.randint(quickstart.VOCAB_SIZE, (8, BATCH, CONTEXT + 1)))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_dir = Path(folder) / "tokenizer"
        train_tokenizer(PythonDocs().texts("train"), quickstart.VOCAB_SIZE, tokenizer_dir)
        ratios = []
        for i in range(args.rounds):
            ours = loop_of_ours(Path(folder) / str(i), tokenizer_dir, args.precision, args.steps)
            bare = bare_loop(batches, args.precision, args.steps)
            ratios.append(bare / ours)
            print(f"round {i + 1}: pretrain {BATCH * CONTEXT / ours:,.0f} tokens/s, bare {BATCH * CONTEXT / bare:,.0f}")
    print(
        f"{args.precision}: litgpt pretrain reaches {statistics.median(ratios):.3f} of a bare loop (median of {ratios})"
    )


if __name__ == "__main__":
    main()
