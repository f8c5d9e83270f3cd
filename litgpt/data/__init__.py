"""Data modules: `litgpt pretrain MODEL --data NAME --data.field value`, likewise `litgpt finetune`."""

from litgpt.data.base import DataModule
from litgpt.data.json_data import JSON
from litgpt.data.lit_data import LitData
from litgpt.data.microllama import MicroLlama
from litgpt.data.openwebtext import OpenWebText
from litgpt.data.preferences import Preferences
from litgpt.data.python_docs import PythonDocs
from litgpt.data.sft import SFTDataset, get_sft_collate_fn
from litgpt.data.text_files import TextFiles
from litgpt.data.tinyllama import TinyLlama
from litgpt.data.tinystories import TinyStories

__all__ = [
    "JSON",
    "DataModule",
    "LitData",
    "MicroLlama",
    "OpenWebText",
    "Preferences",
    "PythonDocs",
    "SFTDataset",
    "TextFiles",
    "TinyLlama",
    "TinyStories",
    "get_sft_collate_fn",
]
