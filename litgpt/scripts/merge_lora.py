"""The command `litgpt merge_lora`."""

from pathlib import Path
from typing import Any

import torch
import yaml

from litgpt.checkpoint.atomic import remove_leftovers
from litgpt.checkpoint.folders import WEIGHTS_NAME, existing_file, existing_folder
from litgpt.checkpoint.hub import find_checkpoint
from litgpt.checkpoint.lora_merge import LORA_NAME, is_merged, merge_folder
from litgpt.lora import LoRASettings
from litgpt.registry import load_checkpoint_config

_DTYPES = {"32-true": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def merge_lora(
    checkpoint_dir: Path, pretrained_checkpoint_dir: Path | None = None, precision: str | None = None
) -> None:
    """Merge the weights of LoRA finetuning into the model that was finetuned.

    The merged model, `lit_model.pth`, is written into the same folder, which all commands then read as any other
    checkpoint. The weights go through memory one at a time. Where the merged model is there already nothing is done;
    one of an earlier run is replaced.

    Args:
        checkpoint_dir: Folder with lit_model.pth.lora and hyperparameters.yaml, such as the final folder of a run.
            checkpoints/NAME may be given as NAME.
        pretrained_checkpoint_dir: Folder of the model that was finetuned, of litgpt or of Hugging Face; default: the
            one in hyperparameters.yaml.
        precision: 32-true, bf16-true or 16-true to store the merged weights in; default: that of the weights of LoRA.
    """
    folder = existing_folder(checkpoint_dir)
    existing_file(folder / LORA_NAME)
    if precision is not None and precision not in _DTYPES and not precision.endswith("-mixed"):
        raise ValueError(f"precision {precision!r} is not known: choose {', '.join(_DTYPES)}")
    lora, base, _ = load_lora_metadata(folder)
    remove_leftovers(folder)
    if pretrained_checkpoint_dir is None and precision is None and is_merged(folder):
        print(f"{folder / WEIGHTS_NAME} is merged from this {LORA_NAME} already; nothing to do")
        return
    if pretrained_checkpoint_dir is not None:
        base = Path(pretrained_checkpoint_dir)
    try:
        base = find_checkpoint(base, download=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the model that {folder} was finetuned from is not there ({error}): name it with "
            "--pretrained_checkpoint_dir"
        ) from None
    _, config = load_checkpoint_config(base)
    target = merge_folder(folder, base, config, LoRASettings.from_flags(lora), _DTYPES.get(precision or ""))
    print(f"{target}: {target.stat().st_size / 1e6:,.1f} MB")


def load_lora_metadata(checkpoint_dir: Path) -> tuple[dict[str, Any], Path, str | None]:
    """The `lora_*` settings, the folder of the pretrained model and the precision in hyperparameters.yaml.

    Raises:
        FileNotFoundError: There is none, so that nobody knows the scale of the updates.
        ValueError: It is not that of a LoRA run.
    """
    path = Path(checkpoint_dir) / "hyperparameters.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: it holds the settings of LoRA, without which nothing is merged")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or "checkpoint_dir" not in values:
        raise ValueError(f"{path} has no checkpoint_dir: it is not that of a LoRA run")
    lora = {name: value for name, value in values.items() if name.startswith("lora_")}
    return lora, Path(values["checkpoint_dir"]), values.get("precision")
