"""Data sets of the Hugging Face hub, as the files that their repos hold. The package `datasets` is not needed."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

from litgpt.checkpoint.hub_session import clean_token, hub_endpoint, import_hub, is_offline
from litgpt.data.documents import write_json
from litgpt.data.download import download_file
from litgpt.data.rows import SPLIT_NAMES, SUFFIXES

RECORD = "litgpt-files.json"
"""Written when all files of a data set have come: names them, so that the hub is not asked again."""

NO_SAMPLES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json")
FORMS = ("jsonl", "json", "csv", "parquet")
"""The formats that a repo may offer, the one that needs the least first."""


def download_dataset(
    repo_id: str, folder: Path, access_token: str | None = None, splits: Mapping[str, str] | None = None
) -> dict[str, list[Path]]:
    """The files of the splits "train" and, if there is one, "val" of a data set, fetched unless they are there.

    Args:
        repo_id: `org/name` on the hub.
        folder: Where the files go, in the folders that they have in the repo.
        access_token: For gated and private repos; default: HF_TOKEN or a saved login.
        splits: What the splits are called in this repo; default: by usual names.

    Raises:
        ValueError: There is no such repo, it may not be read, or has no file of a known format. One line.
        ConnectionError: The hub cannot be reached.
    """
    record = folder / RECORD
    if (found := read_record(record, repo_id, folder)) is not None:
        return found
    if is_offline():
        raise ConnectionError(f"the data set {repo_id} is not in {folder}, and HF_HUB_OFFLINE forbids to fetch it")
    token = clean_token(access_token or os.environ.get("HF_TOKEN"))
    commit, names = list_files(repo_id, token)
    chosen = choose_files(names, splits or {})
    if "train" not in chosen:
        raise ValueError(f"the data set {repo_id} has no files of a known format ({', '.join(FORMS)}) for training")
    for name in (name for files in chosen.values() for name in files):
        url = f"{hub_endpoint()}/datasets/{repo_id}/resolve/{commit}/{quote(name)}"
        download_file(url, folder / name, token)
    write_json(record, {"repo_id": repo_id, "commit": commit, "splits": chosen})
    return {split: [folder / name for name in files] for split, files in chosen.items()}


def read_record(record: Path, repo_id: str, folder: Path) -> dict[str, list[Path]] | None:
    """The files that `record` names, if they are of this data set and all there."""
    try:
        kept = json.loads(record.read_text(encoding="utf-8"))
        files = {split: [folder / name for name in names] for split, names in kept["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    complete = kept.get("repo_id") == repo_id and all(path.is_file() for paths in files.values() for path in paths)
    return files if complete else None


def list_files(repo_id: str, token: str | None) -> tuple[str, list[str]]:
    """The newest commit of a data set repo, and the names of its files."""
    hub = import_hub()
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    where = f"{hub_endpoint()}/datasets/{repo_id}"
    try:
        api = hub.HfApi(endpoint=hub_endpoint(), token=token, library_name="litgpt")
        info = api.dataset_info(repo_id, timeout=60)
        if info.gated and token is None and hub.get_token() is None:
            raise ValueError(f"the data set {repo_id} is gated: ask for access at {where}, then set HF_TOKEN")
        return info.sha, [sibling.rfilename for sibling in info.siblings or []]
    except GatedRepoError:
        raise ValueError(f"the data set {repo_id} is gated: ask for access at {where}, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ValueError(f"the hub has no data set {repo_id!r}, or it is private and needs HF_TOKEN") from None
    except (HfHubHTTPError.__bases__[0], OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConnectionError(f"cannot list the data set {repo_id} at {hub_endpoint()}: {reason}") from None


def choose_files(names: Iterable[str], splits: Mapping[str, str]) -> dict[str, list[str]]:
    """The files of each split among the `names` in a repo: by the split's name in theirs; without any, all are train.

    Names that lead out of the repo's folder are left out, as are files that describe the data.
    """
    names = [n for n in names if not n.startswith((".", "/")) and ".." not in n.split("/") and "\\" not in n]
    names = [n for n in names if Path(n).suffix in SUFFIXES and Path(n).name not in NO_SAMPLES]
    forms = [form for form in FORMS if any(SUFFIXES[Path(n).suffix] == form for n in names)]
    chosen: dict[str, list[str]] = {}
    for split, usual in SPLIT_NAMES.items():
        for word in [splits[split]] if split in splits else usual:
            found = [n for n in names if re.search(rf"(?:^|[/._-]){word}(?:[/._-])", n)]
            by_form = [[n for n in found if SUFFIXES[Path(n).suffix] == form] for form in forms]
            if files := next(filter(None, by_form), None):
                chosen[split] = sorted(files)
                break
    if not chosen and not splits and forms:
        chosen["train"] = sorted(n for n in names if SUFFIXES[Path(n).suffix] == forms[0])
    return chosen
