"""What differs between the ways to finetune. The loop knows nothing else about them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litgpt.checkpoint.folders import WEIGHTS_NAME
from litgpt.checkpoint.loading import load_weights
from litgpt.config import Config
from litgpt.optimizers import build_optimizer


class Method:
    """A way to finetune; this one trains all weights.

    A method that adds weights of its own to a frozen model overrides the first three methods and `weights_name`.
    """

    name = "full"
    """Stands in messages and names the experiment."""
    weights_name = WEIGHTS_NAME
    """File written into each checkpoint folder; a method that saves a part of the weights adds its suffix."""

    def prepare(self, model: nn.Module, config: Config) -> None:
        """Add modules to the pretrained model, whose weights are there."""

    def mark_trainable(self, model: nn.Module) -> None:
        """Freeze what this method leaves alone. Called before the optimizer exists."""

    def is_saved(self, name: str) -> bool:
        """Whether the parameter `name` belongs into the weights file."""
        return True

    def build_optimizer(self, optimizer: str | Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over what is trained."""
        return build_optimizer(optimizer, model)

    def finish(self, folder: Path, checkpoint_dir: Path, config: Config) -> None:
        """Add to the folder of the final weights what makes it ready for use, before the folder appears.

        Args:
            folder: Holds the weights file, the configs and the tokenizer.
            checkpoint_dir: The model that was finetuned.
            config: Its config.
        """

    def next_command(self, folder: Path, checkpoint_dir: Path) -> str:
        """What generates with the final weights in `folder`; `--prompt` is added."""
        return f"litgpt generate {folder}"

    @property
    def is_partial(self) -> bool:
        """Whether the weights file holds a part of the model, beside the one in the checkpoint folder."""
        return self.weights_name != WEIGHTS_NAME

    def load_part(self, model: nn.Module, file: Path) -> None:
        """Bring back the part of the weights that a checkpoint of this method holds.

        Raises:
            ValueError: It is that of another model or of other settings of the method.
        """
        weights = load_weights(file)
        state = model.state_dict()
        wanted = {name: tensor.shape for name, tensor in state.items() if self.is_saved(name)}
        found = {name: tensor.shape for name, tensor in weights.items()}
        if wanted != found:
            differ = sorted({name for name, _ in wanted.items() ^ found.items()})
            raise ValueError(
                f"{file} does not fit this run ({len(differ)} weights differ, such as {differ[0]}): resume with the "
                f"same model and the same settings of {self.name}"
            )
        with torch.no_grad():
            for name, tensor in weights.items():
                state[name].copy_(tensor)
