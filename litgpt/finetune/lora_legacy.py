"""The older name of `litgpt.finetune.lora`. This module only hands its names on."""

from litgpt.finetune.lora import *  # noqa: F403
from litgpt.finetune.lora import __all__  # noqa: F401
