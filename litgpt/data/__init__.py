"""Data modules: `litgpt pretrain MODEL --data NAME --data.field value`."""

from litgpt.data.base import DataModule
from litgpt.data.lit_data import LitData
from litgpt.data.microllama import MicroLlama
from litgpt.data.openwebtext import OpenWebText
from litgpt.data.python_docs import PythonDocs
from litgpt.data.text_files import TextFiles
from litgpt.data.tinyllama import TinyLlama
from litgpt.data.tinystories import TinyStories

__all__ = ["DataModule", "LitData", "MicroLlama", "OpenWebText", "PythonDocs", "TextFiles", "TinyLlama", "TinyStories"]
