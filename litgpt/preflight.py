"""What is decided and checked before a training run starts, so that it does not fail an hour later."""

import contextlib
import copy
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from litgpt.args import LogArgs, TrainArgs
from litgpt.config import Config, find_multiple
from litgpt.data.base import DataModule
from litgpt.data.pretraining import TokenData
from litgpt.data.tinyllama import TinyLlama
from litgpt.loggers import choose_logger
from litgpt.registry import ModelSpec, get_model_spec, resolve_model
from litgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class RunSettings:
    """What `Config.update_from_run` learns of a run."""

    max_seq_length: int | None
    """Tokens per sample, if the user says so."""
    vocab_size: int | None
    """Tokens that the tokenizer has, if there is one."""


def open_tokenizer(tokenizer_dir: Path | None) -> Tokenizer | None:
    """The tokenizer in a folder, if one is given."""
    if tokenizer_dir is not None and not Path(tokenizer_dir).is_dir():
        raise FileNotFoundError(
            f"--tokenizer_dir {tokenizer_dir} does not exist: give a folder that `litgpt train_tokenizer` or "
            "`litgpt download NAME --tokenizer_only true` made."
        )
    return None if tokenizer_dir is None else Tokenizer(tokenizer_dir)


def choose_model(
    model_name: str | None, model_config: Config | dict | None, train: TrainArgs, tokenizer: Tokenizer | None = None
) -> tuple[ModelSpec, Config]:
    """The model to train, its config adapted to the run."""
    if isinstance(model_config, Config):
        spec, config = get_model_spec(model_config.model_type), copy.copy(model_config)
    elif model_name is None and not model_config:
        raise ValueError(
            "Name a model, as in `litgpt pretrain pythia-14m` (`litgpt pretrain list` shows all), or give "
            "--model_config fields."
        )
    else:
        spec, config = resolve_model(model_name, model_config)
    if train.tie_embeddings:
        config.tie_embeddings = True
    n_tokens = None if tokenizer is None else count_tokens(tokenizer)
    return spec, config.update_from_run(RunSettings(train.max_seq_length, n_tokens))


def count_tokens(tokenizer: Tokenizer) -> int:
    """Size of the vocabulary, added tokens included."""
    processor = tokenizer.processor
    added = processor.get_vocab_size(with_added_tokens=True) if hasattr(processor, "get_vocab_size") else 0
    return max(tokenizer.vocab_size, added)


def choose_data(data: DataModule | None, tokenizer: Tokenizer | None) -> DataModule:
    """The data asked for, or TinyLlama's where it has been prepared.

    Raises:
        ValueError: There is no data, or it is text and there is no tokenizer.
    """
    if data is None:
        data = TinyLlama()
        if not (Path(data.data_path) / "slimpajama" / "train").is_dir():
            raise ValueError(
                f"--data is not given, and its default TinyLlama is not in {data.data_path}: try --data TextFiles "
                "--data.train_data_path DIR with text of yours, or --data PythonDocs, which needs no download."
            )
    if isinstance(data, TokenData) and tokenizer is None:
        raise ValueError(
            f"{type(data).__name__} is text and needs a tokenizer: give --tokenizer_dir with a folder that "
            "`litgpt download NAME --tokenizer_only true` or `litgpt train_tokenizer` made."
        )
    return data


def check_fit(config: Config, train: TrainArgs, tokenizer: Tokenizer | None) -> None:
    """Raise ValueError if samples are longer than the model's context, or the tokenizer knows too many tokens."""
    if train.max_seq_length is not None and train.max_seq_length > config.block_size:
        raise ValueError(
            f"--train.max_seq_length {train.max_seq_length} is above the model's block_size {config.block_size}: lower "
            f"it, or raise --model_config.block_size."
        )
    n_tokens = 0 if tokenizer is None else count_tokens(tokenizer)
    if n_tokens > config.padded_vocab_size:
        raise ValueError(
            f"The tokenizer has {n_tokens} tokens, the model {config.padded_vocab_size}: give "
            f"--model_config.vocab_size {n_tokens} and "
            f"--model_config.padded_vocab_size {find_multiple(n_tokens, config.padding_multiple)}."
        )


def open_tracker(
    logger_name: str, out_dir: Path, name: str, train: TrainArgs, log: LogArgs, resume: bool
) -> Any | None:
    """The experiment tracker; None, with a warning, where its package is missing."""
    try:
        return choose_logger(logger_name, out_dir, name, train.log_interval, asdict(log), resume)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"No {logger_name} logs, metrics.csv has all figures: {reason}", stacklevel=2)
        return None


def init_out_dir(out_dir: Path) -> Path:
    """`out_dir`, below the folder that the environment variable LIGHTNING_ARTIFACTS_DIR names if it is relative."""
    root = os.environ.get("LIGHTNING_ARTIFACTS_DIR")
    return Path(root) / out_dir if root and not Path(out_dir).is_absolute() else Path(out_dir)


def check_writable(folder: Path) -> None:
    """Make `folder` and try to write a file there.

    Raises:
        OSError: With one line that says what to change.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(tempfile.TemporaryFile(dir=folder)):
            pass
    except OSError as error:
        raise OSError(f"cannot write to --out_dir {folder}: {error.strerror}; choose another --out_dir") from error
