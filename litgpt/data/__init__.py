"""Data modules: `litgpt pretrain MODEL --data NAME --data.field value`."""

from litgpt.data.base import DataModule
from litgpt.data.text_files import TextFiles

__all__ = ["DataModule", "TextFiles"]
