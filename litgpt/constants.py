"""What is installed beside litgpt: objects that are true if their package is there, looked up only when asked."""

import importlib.util
import operator
import re
from importlib.metadata import PackageNotFoundError, version
from typing import get_args

from litgpt.types import LoggerChoice

_COMPARISONS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


class Requirement:
    """A package, with version bounds if need be, whose truth says whether this environment has it.

    Args:
        text: As in a requirements file: `"wandb"`, `"torch>=2.7.0,<2.8"`.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.package, bounds = re.match(r"\s*([\w.-]+)\s*(.*)", text).groups()
        self.bounds = re.findall(r"(>=|<=|==|!=|>|<)\s*([\w.]+)", bounds)

    def __bool__(self) -> bool:
        try:
            have = _release(version(self.package))
        except PackageNotFoundError:
            return not self.bounds and importlib.util.find_spec(self.package.replace("-", "_")) is not None
        return all(_COMPARISONS[sign](have, _release(bound)) for sign, bound in self.bounds)

    def __str__(self) -> str:
        if self:
            return f"Requirement {self.text!r} met"
        return f"{self.text!r} is missing. Install it with: pip install {self.text!r}"

    def __repr__(self) -> str:
        return f"Requirement({self.text!r})"


def _release(text: str) -> tuple[int, ...]:
    """The numbers at the head of a version, without trailing zeros: `"2.8.0+cu126"` gives `(2, 8)`."""
    numbers = [int(n) for n in re.match(r"\d+(?:\.\d+)*", text).group().split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


_SUPPORTED_LOGGERS: tuple[str, ...] = get_args(LoggerChoice)

_LITLOGGER_AVAILABLE = Requirement("litlogger>=0.1.7")
_TENSORBOARD_AVAILABLE = Requirement("tensorboard")
_WANDB_AVAILABLE = Requirement("wandb")
_MLFLOW_AVAILABLE = Requirement("mlflow")
_MLFLOW_SKINNY_AVAILABLE = Requirement("mlflow-skinny")
_TORCH_EQUAL_2_7 = Requirement("torch>=2.7.0,<2.8")
_TORCH_EQUAL_2_8 = Requirement("torch>=2.8.0,<2.9")
_REQUESTS_AVAILABLE = Requirement("requests")
_THUNDER_AVAILABLE = Requirement("thunder")
_TRITON_AVAILABLE = Requirement("triton")
_BITANDBYTES_AVAILABLE = Requirement("bitsandbytes")
_BITANDBYTES_AVAILABLE_NOT_EQUAL_0_42_0 = Requirement("bitsandbytes != 0.42.0")
_LITDATA_AVAILABLE = Requirement("litdata")
_LITSERVE_AVAILABLE = Requirement("litserve")
_JINJA2_AVAILABLE = Requirement("jinja2")
_SAFETENSORS_AVAILABLE = Requirement("safetensors")
_HF_TRANSFER_AVAILABLE = Requirement("hf_transfer")
