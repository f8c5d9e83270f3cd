"""What a checkpoint folder is made of, and which one to go on from."""

import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

WEIGHTS_NAME = "lit_model.pth"
CONFIG_FILES = (
    "config.json", "generation_config.json", "model_config.yaml", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json",
)  # fmt: skip

WEIGHT_PATTERNS = {
    WEIGHTS_NAME: None, "model.safetensors.index.json": None, "*.safetensors.index.json": 1, "model.safetensors": None,
    "model-*-of-*.safetensors": None, "*.safetensors": 1, "pytorch_model.bin.index.json": None,
    "pytorch_model.bin": None, "pytorch_model-*-of-*.bin": None,
}  # fmt: skip
"""Where weights are looked for, in this order -> how many files may match, so that none is taken by chance."""

SEAL_BYTES = len("litgpt crc32 01234567\n")
"""Length of the checksum at the end of the torch files that we write; see `crc.py`."""

_ZIP_END_BYTES = 22
_STEP = re.compile(r"step-(\d+)")


def find_resume_path(resume: bool | Literal["auto"] | Path, out_dir: Path, name: str = WEIGHTS_NAME) -> Path | None:
    """The weights file to go on from.

    Args:
        resume: False: none. True: the newest complete `step-*/*.pth` below `out_dir`. "auto": the same, or none if
            there is none. Otherwise a file, or a folder that holds a checkpoint or step folders.
        out_dir: Where the run writes.
        name: Of the weights file; `*.pth` files of other names serve where lit_model.pth is asked for.

    Raises:
        FileNotFoundError: There is nothing to resume from.
        ValueError: The file named is cut off.
    """
    if not resume:
        return None
    is_given = not isinstance(resume, bool) and resume != "auto"
    folder = Path(resume) if is_given else Path(out_dir)
    if is_given and folder.is_file():
        if not is_complete(folder):
            raise ValueError(f"cannot resume from {folder}: it is cut off or no checkpoint; resume from an older one")
        return folder
    candidates = step_files(folder, name)
    if is_given:
        candidates = weights_files(folder, name) or candidates
    for file in reversed(candidates):
        if is_complete(file):
            return file
        warnings.warn(f"{file} is cut off and is passed over", stacklevel=2)
    if resume == "auto":
        return None
    advice = f"or {name}" if is_given else "; start without `--resume` or with `--resume auto`"
    raise FileNotFoundError(f"nothing to resume from: {folder} holds no complete step-*/{name} {advice}")


def find_weights_file(checkpoint_dir: Path | str, but: str | None = None) -> Path:
    """The file to start reading weights from: `lit_model.pth`, else safetensors, else `pytorch_model*.bin`.

    Args:
        checkpoint_dir: Folder to look in.
        but: Name of a file that is not looked for.

    Returns:
        A single file, an index of shards, or the first of numbered shards that have no index.
    """
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is {'a file, not a folder' if folder.exists() else 'not there'}")
    for pattern, most in WEIGHT_PATTERNS.items():
        if pattern == but:
            continue
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found and (most is None or len(found) <= most):
            return found[0]
    raise FileNotFoundError(
        f"{folder} holds no weights: expected {'' if but == WEIGHTS_NAME else f'{WEIGHTS_NAME}, '}*.safetensors or "
        "pytorch_model*.bin, alone or with an index of several"
    )


def step_files(out_dir: Path, name: str = WEIGHTS_NAME) -> list[Path]:
    """The weights files `name` of the step folders in `out_dir`, oldest first."""
    found = [(int(match[1]), path) for path in out_dir.glob("step-*") if (match := _STEP.fullmatch(path.name))]
    return [file for _, folder in sorted(found) for file in weights_files(folder, name)[-1:]]


def weights_files(folder: Path, name: str = WEIGHTS_NAME) -> list[Path]:
    """The `.pth` files in `folder`, `lit_model.pth` last; only those called `name` if that is another one."""
    found = folder.glob("*.pth" if name == WEIGHTS_NAME else name)
    return sorted(found, key=lambda file: (file.name == WEIGHTS_NAME, file.name))


def is_complete(file: Path) -> bool:
    """Whether the end of a torch file is there; says nothing about flipped bits."""
    if not zipfile.is_zipfile(file):
        return False
    with open(file, "rb") as stream:
        stream.seek(max(0, file.stat().st_size - _ZIP_END_BYTES - SEAL_BYTES))
        tail = stream.read()
    ends = {n: tail[-_ZIP_END_BYTES - n :] for n in (0, SEAL_BYTES)}  # length of a comment -> what the file ends with
    return any(end[:4] == b"PK\5\6" and end[20:22] == n.to_bytes(2, "little") for n, end in ends.items())


def copy_config_files(source_dir: Path, out_dir: Path) -> None:
    """Copy the config and tokenizer files that a checkpoint folder needs beside its weights, where they exist."""
    for name in CONFIG_FILES:
        source = Path(source_dir) / name
        if source.is_file() and source.resolve() != (Path(out_dir) / name).resolve():
            shutil.copy(source, out_dir)


def extend_checkpoint_dir(checkpoint_dir: Path) -> Path:
    """`checkpoints/NAME` for a relative NAME that exists only there; anything else as it is."""
    path = Path(checkpoint_dir)
    if path.is_dir() or path.is_absolute() or path.parts[:1] == ("checkpoints",):
        return path
    return extended if (extended := Path("checkpoints") / path).is_dir() else path


def check_valid_checkpoint_dir(
    checkpoint_dir: Path,
    model_filename: str = WEIGHTS_NAME,
    verbose: bool = True,
    raise_error: bool = False,
    ignore_tokenizer_files: bool = False,
) -> None:
    """Check that the folder holds weights, `model_config.yaml` or `config.json`, and a tokenizer.

    Raises:
        FileNotFoundError: With `raise_error`, saying what is missing.
        SystemExit: Status 1 otherwise; the message goes to stderr if `verbose`.
    """
    folder = Path(checkpoint_dir)
    wanted = {model_filename: [model_filename], "model_config.yaml": ["model_config.yaml", "config.json"]}
    if model_filename == WEIGHTS_NAME:  # a folder of Hugging Face is read in place
        wanted[WEIGHTS_NAME] += ["*.safetensors", "pytorch_model*.bin"]
        wanted["model_config.yaml"].append("config.json")
    if not ignore_tokenizer_files:
        wanted["tokenizer.json or tokenizer.model"] = ["tokenizer.json", "tokenizer.model"]
        wanted["tokenizer_config.json"] = ["tokenizer_config.json"]
    lacking = [what for what, patterns in wanted.items() if not any(any(folder.glob(name)) for name in patterns)]
    if folder.is_dir() and not lacking:
        return
    reason = f"it lacks {', '.join(lacking)}" if folder.is_dir() else "there is no such folder"
    local = sorted(str(path.parent) for path in Path("checkpoints").glob("*/*/model_config.yaml"))
    advice = f"checkpoints at hand: {', '.join(local)}" if local else "`litgpt download` fetches one"
    if below := [*folder.glob("final/*.pth"), *step_files(folder)[-1:]]:
        advice = f"did you mean {below[0].parent}?"
    message = f"{folder} is no checkpoint folder: {reason}; {advice}"
    if raise_error:
        raise FileNotFoundError(message)
    if verbose:
        print(message, file=sys.stderr)
    raise SystemExit(1)


def existing_file(path: Path | str) -> Path:
    """`path`, if it is a regular file."""
    if not (path := Path(path)).is_file():
        raise FileNotFoundError(f"{path} is {'a folder, not a file' if path.is_dir() else 'not there'}")
    return path


def existing_folder(path: Path | str) -> Path:
    """`path` or `checkpoints/path`, whichever is a folder."""
    folder = extend_checkpoint_dir(Path(path))
    if not folder.is_dir():
        reason = "a file, not a folder" if folder.is_file() else "not there"
        raise FileNotFoundError(f"{folder} is {reason}, and checkpoints/{path} is no folder either")
    return folder


def damaged(path: Path, reason: str) -> ValueError:
    """The error that says what is wrong with a weights file and which other one may serve."""
    others = [file for file in step_files(path.parent.parent) if file.parent != path.parent and is_complete(file)]
    advice = f"another checkpoint is {others[-1]}" if others else "use another copy of it"
    return ValueError(f"{path} is cut off or damaged ({reason}); {advice}")


def some(names: Iterable[str], most: int = 6) -> str:
    """The first few of many names, for a message; what a terminal could take for a command is spelled out."""
    names = [name[:200] if name.isprintable() else ascii(name[:200]) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
