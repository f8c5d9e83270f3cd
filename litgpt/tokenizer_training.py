"""A tokenizer of your own: byte-level BPE, trained on text."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out_dir: Path | str,
    eos_token: str = "<|endoftext|>",
    show_progress: bool = False,
) -> None:
    """Train a byte-level BPE, which can spell any text, and write it for `Tokenizer` and Hugging Face's AutoTokenizer.

    The same texts give the same files.

    Args:
        texts: documents.
        vocab_size: number of tokens wanted, at least 258: the 256 bytes, `eos_token` and one merge. Little text may
            give fewer.
        out_dir: folder for tokenizer.json and tokenizer_config.json; other files in it stay.
        eos_token: stands at the beginning of each text (BOS) and at its end (EOS).
        show_progress: draw the progress of the merging.
    """
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    out_dir = Path(out_dir)
    if vocab_size < 258:
        raise ValueError(
            f"vocab_size is {vocab_size}, but a byte-level BPE needs at least 258: 256 bytes, {eos_token} and a merge."
        )
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"out_dir {str(out_dir)!r} is a file; name a folder.")
    n_texts = 0

    def counted() -> Iterator[str]:
        nonlocal n_texts
        for text in texts:
            if text:
                n_texts += 1
                yield text.encode("utf-8", "replace").decode("utf-8")  # half surrogate pairs become question marks

    processor = HFTokenizer(models.BPE())
    processor.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    processor.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[eos_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    processor.train_from_iterator(counted(), trainer)
    if not n_texts:
        raise ValueError("There is no text to train the tokenizer on: all documents are empty, or there are none.")
    processor.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{eos_token} $A",
                pair=f"{eos_token} $A {eos_token} $B",
                special_tokens=[(eos_token, processor.token_to_id(eos_token))],
            ),
        ]
    )
    config = {
        "add_bos_token": True,
        "bos_token": eos_token,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos_token,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {
        "tokenizer.json": processor.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    _write_files(files, out_dir)


def _write_files(files: dict[str, str], folder: Path) -> None:
    """Write text files into `folder` through a temporary one beside it, so that none is ever half written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
    temporary.mkdir(exist_ok=True)
    try:
        for name, text in files.items():
            with open(temporary / name, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            for name in files:
                os.replace(temporary / name, folder / name)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
