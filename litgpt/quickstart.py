"""`litgpt quickstart`: the main job from nothing, on any machine: tokenizer, pretraining, text, finetuning, loss plots.

Nothing is downloaded: the text is the documentation that comes with Python.
"""

import contextlib
import time
from pathlib import Path

import torch

from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import LlamaConfig
from litgpt.data.python_docs import PythonDocs
from litgpt.data.python_docs_qa import PythonDocsQA
from litgpt.finetune import lora
from litgpt.generate.base import main as generate
from litgpt.hardware import get_default_supported_precision
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from litgpt.tokenizer_training import train_tokenizer

VOCAB_SIZE = 2048
CONTEXT = 256
BATCH_SIZE = 16
PROMPTS = ("The for statement is used to", "Return True if")
QUESTION = "What does os.path.join do?"
FINETUNING_SHARE = 0.25
"""Time of the finetuning, in shares of that of the pretraining."""


def setup(
    out_dir: Path = Path("out/quickstart"), minutes: float = 2.0, max_steps: int | None = None, seed: int = 42
) -> None:
    """Train a tokenizer and a small GPT on the documentation inside your Python, let it write, and teach it to answer.

    It takes about four minutes on two CPU cores and needs no network. Each step prints the command that does the same.

    Args:
        out_dir: Folder for the tokenizer, the checkpoints, the metrics and the loss plots.
        minutes: How long to pretrain; the number of steps is chosen from the speed of this machine.
        max_steps: Number of optimizer steps to take, instead of choosing it.
        seed: Seed of weights, data order and sampling.
    """
    if minutes <= 0:
        raise ValueError(f"--minutes is {minutes}: it must be more than 0.")
    out_dir, start = Path(out_dir), time.perf_counter()
    tokenizer_dir, run_dir, tuned_dir = out_dir / "tokenizer", out_dir / "pretrain", out_dir / "finetune"

    heading(1, "A tokenizer from the text", f"litgpt train_tokenizer --data PythonDocs --vocab_size {VOCAB_SIZE}")
    train_tokenizer(PythonDocs().texts("train"), VOCAB_SIZE, tokenizer_dir)
    print(f"{tokenizer_dir}: {Tokenizer(tokenizer_dir).vocab_size:,} tokens")

    heading(2, "Pretraining", f"litgpt pretrain --data PythonDocs --tokenizer_dir {tokenizer_dir} --optimizer Muon ...")
    config = build_config()
    precision, seconds_per_step = fastest_precision(config)
    steps = max_steps or max(20, round(60 * minutes / seconds_per_step))
    print(f"{steps} steps in {precision}, about {seconds_per_step:.2f} s each on this machine")
    pretrain.setup(
        model_config=config,
        out_dir=run_dir,
        precision=precision,
        data=PythonDocs(),
        train=TrainArgs(
            save_interval=None,
            log_interval=10,
            global_batch_size=BATCH_SIZE,
            micro_batch_size=BATCH_SIZE,
            max_tokens=int(1e12),
            max_steps=steps,
            max_time=90 * minutes,  # should the machine turn slower than it was
            max_seq_length=CONTEXT,
            max_norm=1.0,
            lr_warmup_steps=steps // 20,
            min_lr=0.0,
        ),
        eval=EvalArgs(interval=max(10, steps // 5), max_iters=16),
        optimizer={"class_path": "Muon", "init_args": {"lr": 4e-3, "weight_decay": 0.1}},
        devices=1,
        tokenizer_dir=tokenizer_dir,
        logger_name="csv",
        seed=seed,
    )

    checkpoint_dir = run_dir / "final"
    for prompt in PROMPTS:
        heading(3, "What it has learnt", f'litgpt generate {checkpoint_dir} --prompt "{prompt}"')
        generate(checkpoint_dir, prompt, max_new_tokens=80, temperature=0.7, top_k=50, precision="32-true", seed=seed)

    steps = max(10, round(FINETUNING_SHARE * steps))
    heading(
        4, "Finetuning on questions", f"litgpt finetune_lora {checkpoint_dir} --data PythonDocsQA --lora_mlp true ..."
    )
    finetune(checkpoint_dir, tuned_dir, steps, 60 * FINETUNING_SHARE * minutes, precision, seed)
    checkpoint_dir = tuned_dir / "final"
    heading(5, "What it answers", f'litgpt generate {checkpoint_dir} --prompt "{QUESTION}"')
    generate(checkpoint_dir, QUESTION, max_new_tokens=80, temperature=0.7, top_k=50, precision="32-true", seed=seed)

    heading(6, f"Done in {time.perf_counter() - start:.0f} s", f'litgpt generate {checkpoint_dir} --prompt "..."')
    for what, folder in (("Pretrained", run_dir), ("Finetuned", tuned_dir)):
        plot = folder / "loss.png"
        print(f"{what:<11}{folder / 'final'}, {folder / 'metrics.csv'}", end="")
        print(f", {plot}" if plot.exists() else "; for a loss plot: pip install 'litgpt[plot]'")


def finetune(checkpoint_dir: Path, out_dir: Path, steps: int, seconds: float, precision: str, seed: int) -> None:
    """Teach the model to answer questions about Python, with low-rank updates of all its layers."""
    lora.setup(
        checkpoint_dir,
        out_dir,
        precision,
        lora_r=16,
        lora_alpha=32,
        lora_key=True,
        lora_projection=True,
        lora_mlp=True,
        data=PythonDocsQA(prompt_style="phi-2", group_by_length=True),
        train=TrainArgs(
            save_interval=None,
            log_interval=10,
            global_batch_size=BATCH_SIZE,
            micro_batch_size=BATCH_SIZE,
            epochs=100,
            max_steps=steps,
            max_time=1.5 * seconds,  # should the machine turn slower than it was
            max_seq_length=CONTEXT,
            lr_warmup_steps=steps // 10,
            min_lr=0.0,
        ),
        eval=EvalArgs(interval=max(10, steps // 2), max_iters=16, max_new_tokens=40),
        optimizer={"class_path": "AdamW", "init_args": {"lr": 4e-3}},
        seed=seed,
    )


def heading(number: int, what: str, command: str) -> None:
    """Say what comes now, and which command does it."""
    print(f"\n[{number}/6] {what}\n      {command}", flush=True)


def build_config() -> LlamaConfig:
    """A Llama of about 5 million parameters."""
    return LlamaConfig(
        name="quickstart",
        n_layer=6,
        n_embd=256,
        n_head=4,
        n_query_groups=4,
        intermediate_size=688,
        vocab_size=VOCAB_SIZE,
        padding_multiple=64,
        block_size=CONTEXT,
        norm_eps=1e-5,
        tie_embeddings=True,
    )


def fastest_precision(config: LlamaConfig) -> tuple[str, float]:
    """The precision in which this machine trains fastest, and the seconds that a step takes.

    On a CPU bfloat16 can be twice as fast as float32 or many times slower, which no flag tells.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    candidates = (
        [get_default_supported_precision(training=True)] if device.type == "cuda" else ["32-true", "bf16-mixed"]
    )
    return min(((name, seconds_of_step(config, name, device)) for name in candidates), key=lambda pair: pair[1])


def seconds_of_step(config: LlamaConfig, precision: str, device: torch.device, n: int = 5) -> float:
    """Seconds of one forward and backward pass, the best of `n`."""
    model = GPT(config).to(device)
    idx = torch.randint(config.vocab_size, (BATCH_SIZE, CONTEXT + 1), device=device)
    cast = contextlib.nullcontext() if precision == "32-true" else torch.autocast(device.type, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(n):
        start = time.perf_counter()
        with cast:
            loss, count = model(idx[:, :-1], targets=idx[:, 1:])
        (loss / count).backward()
        model.zero_grad(loss.item() == 0)  # reading the loss waits for a GPU
        best = min(best, time.perf_counter() - start)
    return best
