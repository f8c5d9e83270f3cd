"""The command `litgpt convert_pretrained_checkpoint`."""

import shutil
from pathlib import Path

from litgpt.checkpoint.adapter import is_hf_names
from litgpt.checkpoint.atomic import atomic_folder, remove_leftovers
from litgpt.checkpoint.folders import (
    WEIGHTS_NAME,
    check_valid_checkpoint_dir,
    copy_config_files,
    existing_folder,
    find_weights_file,
)
from litgpt.checkpoint.loading import open_model_weights
from litgpt.checkpoint.tensors import open_weights, write_torch
from litgpt.config import save_config
from litgpt.registry import load_checkpoint_config

_OTHER_FILES = ("prompt_style.yaml", "hyperparameters.yaml")


def convert_pretrained_checkpoint(checkpoint_dir: Path, output_dir: Path) -> None:
    """Take the weights out of a checkpoint of `litgpt pretrain`, without the optimizer, for use and for finetuning.

    Every command also reads the checkpoint as it is; this one makes it smaller, by about two thirds with AdamW.

    Args:
        checkpoint_dir: A checkpoint folder that pretraining wrote, such as out/pretrain/step-00001000.
        output_dir: Folder to write lit_model.pth and the config and tokenizer files into. It must not exist, or be
            empty; it appears when it is complete.
    """
    checkpoint_dir, output_dir = existing_folder(checkpoint_dir), Path(output_dir)
    check_valid_checkpoint_dir(checkpoint_dir, raise_error=True, ignore_tokenizer_files=True)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        kind = "holds files already" if output_dir.is_dir() else "is a file"
        raise ValueError(f"{output_dir} {kind}: name a folder that does not exist yet, or an empty one")
    weights = find_weights_file(checkpoint_dir)
    tensors, config = open_weights(weights), None
    if is_hf_names(tensors):
        config = load_checkpoint_config(checkpoint_dir)[1]
        tensors = open_model_weights(weights, config)
    remove_leftovers(output_dir.absolute().parent)
    with atomic_folder(output_dir) as folder:
        write_torch(folder / WEIGHTS_NAME, tensors)
        copy_config_files(checkpoint_dir, folder)
        if config is not None:
            save_config(config, folder)
        for name in _OTHER_FILES:
            if (checkpoint_dir / name).is_file():
                shutil.copy(checkpoint_dir / name, folder)
    size = (output_dir / WEIGHTS_NAME).stat().st_size
    print(f"{output_dir / WEIGHTS_NAME}: {len(tensors)} tensors, {size / 1e6:,.1f} MB")
