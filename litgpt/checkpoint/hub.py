"""One door to checkpoints: by folder, by name or by repo id; and the way of a folder to the Hugging Face hub."""

import re
import sys
from pathlib import Path
from typing import Any

from litgpt.checkpoint.folders import WEIGHTS_NAME, extend_checkpoint_dir
from litgpt.checkpoint.hub_download import choose_weights, download_repo, has_tokenizer, has_weights
from litgpt.checkpoint.hub_repo import is_repo_id
from litgpt.checkpoint.hub_session import HubSession, did_you_mean, is_offline, known_repo

NEVER_UPLOADED = (".*", "**/.*", "logs/**", "step-*/**", "*.part", "hyperparameters.yaml")
"""Traces of runs; hyperparameters.yaml tells paths of this machine."""
MAX_TEXT_BYTES = 10**7


def find_checkpoint(name_or_dir: str | Path, access_token: str | None = None, download: bool = True) -> Path:
    """The folder of a checkpoint: an existing one, one below `checkpoints/`, or a repo of the hub, fetched if need be.

    Args:
        name_or_dir: A litgpt or Hugging Face folder, a named config, or `org/name` on the hub. The hub is never asked
            for what exists, nor for what begins with `.`, `/`, `~` or `checkpoints`.
        access_token: For gated and private repos.
        download: Whether the network may be used.

    Raises:
        FileNotFoundError: There is no such folder and no model of that name.
        ValueError, ConnectionError, OSError: As `download_repo`.
    """
    text = str(name_or_dir)
    path = extend_checkpoint_dir(Path(text).expanduser())
    if has_weights(path):
        return path
    repo_id = _repo_of(text)
    if repo_id is None:
        what = (
            "holds no model weights with their config" if path.is_dir() else "is no folder, and no model has this name"
        )
        raise FileNotFoundError(f"{text} {what}{did_you_mean(text)}")
    local = Path("checkpoints") / repo_id
    if has_weights(local):
        return local
    if not download:
        raise FileNotFoundError(f"{text} is not on this machine: `litgpt download {repo_id}` fetches it")
    if not is_offline():
        print(f"There is no folder {text}; downloading {repo_id} from the hub.", file=sys.stderr)
    return download_repo(repo_id, access_token=access_token)


def auto_download_checkpoint(
    model_name: str | Path, access_token: str | None = None, ignore_tokenizer_files: bool = False
) -> Path:
    """`find_checkpoint`, which also insists on a tokenizer unless that is to be ignored."""
    folder = find_checkpoint(model_name, access_token)
    if not ignore_tokenizer_files and not has_tokenizer(folder):
        raise FileNotFoundError(f"{folder} holds no tokenizer: expected tokenizer.json or tokenizer.model")
    return folder


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    access_token: str | None = None,
    as_is: bool = False,
) -> str:
    """Push a checkpoint folder to the hub, all its files in one commit, and return the address of that commit.

    Args:
        folder: A Hugging Face folder, or a litgpt folder with `as_is`.
        repo_id: `org/name`; made if it is not there.
        private: Whether a new repo is for its owner only.
        revision: Branch to commit to, made if it is not there; default: main.
        commit_message: First line of the commit.
        access_token: One that may write; default: HF_TOKEN or a saved login.
        as_is: Also push a lit_model.pth that only litgpt can read.

    Raises:
        ValueError: The folder is not fit to be pushed, or the token may not do so.
        ConnectionError: The hub cannot be reached.
    """
    folder = Path(folder)
    _check_upload(folder, repo_id, as_is)
    if is_offline():
        raise ConnectionError(f"cannot upload to {repo_id}: HF_HUB_OFFLINE forbids it")
    session = HubSession(repo_id, access_token, revision)
    if not session.has_token:
        raise ValueError(f"uploading to {repo_id} needs a token that may write: set HF_TOKEN or --access_token")
    _check_no_token(folder, session.headers["authorization"].removeprefix("Bearer "))
    api = session.api
    session.patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if private and not session.patiently(lambda: api.model_info(repo_id)).private:
        raise ValueError(f"{repo_id} exists and is public, and --private true cannot change that: choose another name")
    if revision is not None:
        session.patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    ignored = [*NEVER_UPLOADED, *([] if as_is else ["*.pth"])]
    message = commit_message or f"Upload {folder.resolve().name} with litgpt"

    def push() -> Any:
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message, ignore_patterns=ignored
        )

    return session.patiently(push).commit_url


def _repo_of(text: str) -> str | None:
    """The repo that a name stands for; None for what looks like a path, and for a plain name that is not known."""
    if re.match(r"[.~/\\]|checkpoints(/|$)", text) or Path(text).exists():
        return None
    return text if "/" in text and is_repo_id(text) else known_repo(text)


def _check_upload(folder: Path, repo_id: str, as_is: bool) -> None:
    """Raise where a folder or a repo id is not fit for an upload."""
    if not is_repo_id(repo_id) or "/" not in repo_id:
        raise ValueError(f"{repo_id!r} is no repo id: give the name of your account or organisation too, as org/name")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there, or no folder: nothing to upload")
    weights = choose_weights(path.name for path in folder.iterdir())
    if not weights or not has_weights(folder):
        raise ValueError(f"{folder} holds no weights with their config.json (or model_config.yaml): nothing to upload")
    if weights == [WEIGHTS_NAME] and not as_is:
        raise ValueError(
            f"{folder} holds {WEIGHTS_NAME}, which only litgpt reads: run `litgpt convert_from_litgpt {folder} OUT` "
            "first and upload OUT, or push it as it is with --as_is true"
        )


def _check_no_token(folder: Path, token: str) -> None:
    """Raise if a text file of the folder holds the access token: what is pushed may be read by all."""
    for path in sorted(folder.rglob("*")):
        is_text = path.suffix in (".json", ".yaml", ".yml", ".txt", ".md", ".jinja", ".csv", ".jsonl", "")
        if is_text and path.is_file() and path.stat().st_size < MAX_TEXT_BYTES and token.encode() in path.read_bytes():
            raise ValueError(f"{path} holds your access token: take it out before the folder is uploaded")
