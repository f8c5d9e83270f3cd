"""`litgpt finetune_dpo`: tune a model on preferences, with any of the methods of finetuning."""

from pathlib import Path
from typing import Literal

from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.class_path import class_path
from litgpt.data.base import DataModule
from litgpt.data.preferences import Preferences
from litgpt.finetune.adapter import Adapter
from litgpt.finetune.adapter_v2 import AdapterV2
from litgpt.finetune.launch import launch
from litgpt.finetune.lora import LoRA
from litgpt.finetune.method import Method
from litgpt.finetune.reference import Preparation
from litgpt.finetune.settings import EVAL, Quantize
from litgpt.lora import LoRASettings
from litgpt.optimizers import read_optimizer
from litgpt.preference import LossName, PreferenceObjective
from litgpt.types import LoggerChoice

LEARNING_RATES = {"full": 1e-6, "lora": 5e-5, "adapter": 1e-3, "adapter_v2": 1e-4}
"""Of each method where the user names none: preferences want smaller steps than texts."""


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/dpo"),
    loss: LossName = "dpo",
    beta: float | None = None,
    label_smoothing: float = 0.0,
    gamma: float = 1.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    method: Literal["lora", "full", "adapter", "adapter_v2"] = "lora",
    precompute_reference: bool = False,
    precision: str | None = None,
    quantize: Quantize | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    lora_targets: str | list[str] | None = None,
    lora_rslora: bool = False,
    lora_dora: bool = False,
    lora_plus_ratio: float | None = None,
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    train: TrainArgs = TrainArgs(
        save_interval=1000,
        log_interval=1,
        global_batch_size=16,
        micro_batch_size=2,
        lr_warmup_steps=20,
        epochs=1,
        max_norm=1.0,
        min_lr=0.0,
    ),
    eval: EvalArgs = EVAL,
    log: LogArgs = LogArgs(),
    optimizer: str | dict = "AdamW",
    logger_name: LoggerChoice = "csv",
    seed: int = 1337,
    access_token: str | None = None,
    compile: bool = False,
    activation_checkpointing: bool = False,
    ema_decay: float | None = None,
    early_stopping_patience: int | None = None,
    keep_best: bool = False,
    plot: bool = True,
) -> None:
    """Tune a model on preferences: pairs of a better and a worse answer (DPO, IPO, ORPO, SimPO) or liked and disliked
    single answers (KTO).

    DPO, IPO and KTO compare with the model before the tuning. With LoRA that is the model itself without its updates;
    the other methods load it a second time, unless --precompute_reference true.

    SIGTERM and Ctrl-C finish the step, save a checkpoint and exit with 143 and 130; SIGUSR1 saves and goes on.

    Arguments:
        checkpoint_dir: The model: a folder of litgpt or Hugging Face, or a name such as org/model, which is downloaded.
            Best one that has been finetuned on instructions.
        out_dir: Where to write checkpoints (`step-000100/`, `best/`, `final/`), metrics.csv, metrics.jsonl, loss.png
            and logs.
        loss: What to minimise: dpo (arXiv 2305.18290), ipo (2310.12036), orpo (2403.07691), simpo (2405.14734), or kto
            (2402.01306), which takes single answers.
        beta: How strongly the model is held to where it was (dpo, ipo, kto), the weight of the odds (orpo), or the
            scale of rewards (simpo). Default: 0.1, and 2.0 for simpo.
        label_smoothing: dpo, simpo: probability that a pair is the wrong way round.
        gamma: simpo: margin between the rewards that is aimed at.
        desirable_weight: kto: weight of the liked answers.
        undesirable_weight: kto: weight of the disliked answers.
        method: What is trained: lora, full (all weights), adapter or adapter_v2.
        precompute_reference: Work out the reference's log-probabilities of all pairs before the tuning, and keep them
            with the tokenised data, so that it takes no memory and no time later. Not with kto.
        precision: Precision of the training; by default bf16-mixed, or 16-mixed on GPUs without bf16.
        quantize: Keep the frozen weights in 4 bits (bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq) or 8 (bnb.int8-training);
            needs a `-true` precision.
        devices: How many GPUs, or processes on a CPU, to use; `auto` uses all GPUs.
        num_nodes: How many machines take part.
        lora_r: Rank of the updates.
        lora_alpha: Updates are scaled by alpha / r.
        lora_dropout: Dropout on what goes into the updates; it is noise in the comparison with the reference.
        lora_query: Update the queries.
        lora_key: Update the keys.
        lora_value: Update the values.
        lora_projection: Update the projection behind the attention.
        lora_mlp: Update the MLPs.
        lora_head: Update the head.
        lora_targets: Update these layers instead: names, patterns such as "*.mlp.*", or a regular expression.
        lora_rslora: Scale by alpha / sqrt(r) (arXiv 2312.03732).
        lora_dora: Train the length of the weights' columns apart from their direction (arXiv 2402.09353).
        lora_plus_ratio: Learning rate of B as a multiple of that of A (arXiv 2402.12354), such as 16.
        resume: Whether to go on with a run: `true` takes the newest checkpoint in `out_dir`, `auto` does so if there is
            one, a path names a checkpoint's folder or file.
        data: Where the preferences come from, as `--data Preferences --data.json_path FILE`.
        train: Batch sizes, length, learning rate and checkpoints of the training.
        eval: When and how to validate.
        log: How an experiment tracker files the run.
        optimizer: Name of an optimizer (AdamW, Muon, another one of torch.optim, or a class path), or a map of
            `class_path` and `init_args`. Unless it says so, the learning rate `lr` is 5e-5 for lora, 1e-6 for full,
            1e-3 for adapter, and 1e-4 for adapter_v2.
        logger_name: Experiment tracker, beside the metrics files that are always written.
        seed: Seed of dropout and of the updates.
        access_token: Token of the hub, for models that need one.
        compile: Compile the model: slow to start, then faster.
        activation_checkpointing: Keep less of the forward pass and compute it again: slower, less memory.
        ema_decay: Train as usual but validate and save the running mean of the weights, of which each step keeps this
            share, such as 0.999.
        early_stopping_patience: End the run when so many validations in a row were no better than the best one.
        keep_best: Also save the weights of the best validation, in `best/`.
        plot: Whether to draw the loss curves at the end.
    """
    values = dict(locals())
    objective = PreferenceObjective(loss, beta, label_smoothing, gamma, desirable_weight, undesirable_weight)
    check(objective, method, precompute_reference, quantize, data, train)
    if isinstance(data, Preferences):
        data.unpaired = loss == "kto"
    values["optimizer"] = with_learning_rate(optimizer, method)
    methods = {
        "lora": lambda: LoRA(LoRASettings.from_flags(values), lora_plus_ratio),
        "full": Method,
        "adapter": Adapter,
        "adapter_v2": AdapterV2,
    }
    needs_copy = objective.kind.has_reference and method != "lora"
    before = Preparation(objective, needs_copy, precompute_reference)
    launch(setup, methods[method](), values, objective, before)


def with_learning_rate(optimizer: str | dict, method: str) -> dict:
    """The optimizer, with the learning rate of the method unless it has one."""
    optimizer_class, arguments = read_optimizer(optimizer)
    return {"class_path": class_path(optimizer_class), "init_args": {"lr": LEARNING_RATES[method], **arguments}}


def check(
    objective: PreferenceObjective,
    method: str,
    precompute_reference: bool,
    quantize: str | None,
    data: DataModule | None,
    train: TrainArgs,
) -> None:
    """Raise ValueError that lists each setting that does not go with another."""
    issues = []
    if data is None:
        issues.append("--data is not given: try --data Preferences --data.json_path FILE")
    if method == "full" and quantize:
        issues.append(f"--quantize {quantize} freezes the weights, and --method full trains them: use --method lora")
    if objective.name == "kto" and train.micro_batch_size < 2:
        issues.append("--loss kto compares answers within a batch: --train.micro_batch_size must be 2 or more")
    if precompute_reference and not objective.kind.has_reference:
        issues.append(f"--precompute_reference true: --loss {objective.name} has no reference")
    elif precompute_reference and objective.name == "kto":
        issues.append("--precompute_reference true: --loss kto needs the reference in each batch")
    elif precompute_reference and data is not None and not isinstance(data, Preferences):
        issues.append("--precompute_reference true needs --data Preferences, which can keep the log-probabilities")
    if issues:
        raise ValueError("; ".join(issues))
