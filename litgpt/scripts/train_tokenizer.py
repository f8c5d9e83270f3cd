"""The command `litgpt train_tokenizer`."""

import sys
from collections.abc import Iterable
from pathlib import Path

from litgpt.data.base import DataModule
from litgpt.data.python_docs import PythonDocs
from litgpt.tokenizer import Tokenizer
from litgpt.tokenizer_training import train_tokenizer


def setup(
    data: DataModule | None = None,
    vocab_size: int = 1024,
    out_dir: Path = Path("out/tokenizer"),
    eos_token: str = "<|endoftext|>",
) -> None:
    """Train a tokenizer on your text: byte-level BPE, which can spell any text in any language.

    The folder it writes serves `litgpt pretrain --tokenizer_dir` and `AutoTokenizer.from_pretrained` of Hugging Face.
    The same text gives the same files.

    Args:
        data: Where the text comes from, such as `--data TextFiles --data.train_data_path FOLDER`. Without it: the
            documentation that comes with Python.
        vocab_size: Number of tokens, at least 258. About 1,000 suit a megabyte of text, 32,000 a gigabyte.
        out_dir: Folder to write tokenizer.json and tokenizer_config.json into. Other files in it stay.
        eos_token: The token between documents: it begins each text (BOS) and ends it (EOS).
    """
    data = PythonDocs() if data is None else data
    out_dir = Path(out_dir)
    train_tokenizer(data.texts("train"), vocab_size, out_dir, eos_token=eos_token, show_progress=sys.stderr.isatty())

    tokenizer = Tokenizer(out_dir)
    print(f"{out_dir}: tokenizer of {tokenizer.vocab_size:,} tokens")
    if tokenizer.vocab_size < vocab_size:
        print(f"The text holds too few repeated words for the {vocab_size:,} tokens asked for; more text gives more.")
    if compression := bytes_per_token(tokenizer, held_out_texts(data)):
        print(f"On held-out text a token stands for {compression:.2f} bytes.")


def held_out_texts(data: DataModule) -> Iterable[str]:
    """The validation texts of `data`; none if it keeps none apart."""
    try:
        yield from data.texts("val")
    except ValueError:
        return


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str], max_bytes: int = 4_000_000) -> float | None:
    """UTF-8 bytes for each token, measured on the first `max_bytes` of `texts`; None if there is no text."""
    n_bytes = n_tokens = 0
    for text in texts:
        n_bytes += len(text.encode("utf-8", "replace"))
        n_tokens += len(tokenizer.encode(text, bos=False))
        if n_bytes >= max_bytes:
            break
    return n_bytes / n_tokens if n_tokens else None
