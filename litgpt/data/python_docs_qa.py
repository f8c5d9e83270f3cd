"""Questions about Python that its own documentation answers: finetuning data that needs no download."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from litgpt.data.python_corpus import Document, is_held_out, python_documents, topics
from litgpt.data.sft import SFTDataModule

MAX_ANSWER_CHARACTERS = 1000
"""Longer texts end with the paragraph before."""


@dataclass(kw_only=True)
class PythonDocsQA(SFTDataModule):
    """Questions such as "What does os.path.join do?", answered by the documentation in the running Python."""

    mask_prompt: bool = True
    """Learn the answers only. Without it, the prompt is learnt too, unless --data.train_on says otherwise."""
    val_split_fraction: float = 0.05
    """Share of the samples that is kept for validation; which ones depends on their texts alone, as in PythonDocs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.val_split_fraction < 1:
            raise ValueError(f"--data.val_split_fraction is {self.val_split_fraction}; it must lie between 0 and 1")

    def load_samples(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        splits: tuple[list, list] = ([], [])
        for document in python_documents():
            if answer := first_paragraphs(document.text):
                sample = {"instruction": question(document), "output": answer}
                splits[is_held_out(document.text, self.val_split_fraction)].append(sample)
        return splits


def question(document: Document) -> str:
    """What one would ask to be told this."""
    if document.name in topic_names():
        return f"What does the Python language reference say about {document.name}?"
    is_function = document.signature or re.match(rf"{re.escape(document.name.rpartition('.')[2])}\(", document.text)
    return f"What does {document.name} do?" if is_function else f"What is {document.name}?"


@cache
def topic_names() -> frozenset[str]:
    """Names of the chapters of the language reference."""
    return frozenset(document.name for document in topics())


def first_paragraphs(text: str) -> str:
    """The beginning of a text, up to the last paragraph that is complete within `MAX_ANSWER_CHARACTERS`."""
    if len(text) <= MAX_ANSWER_CHARACTERS:
        return text
    ends = [match.start() for match in re.finditer(r"\n\n", text[: MAX_ANSWER_CHARACTERS + 2])]
    return text[: ends[-1]].rstrip() if ends else ""
