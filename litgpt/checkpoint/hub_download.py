"""A repo of the Hugging Face hub as a checkpoint folder.

Files gather in `.NAME.partial` beside the folder `NAME`, which takes its place in one step when all of them are there
and their hashes are right. So a folder that is there is whole, and the next run goes on with what a kill left behind.
"""

import contextlib
import fnmatch
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from litgpt.checkpoint.atomic import put_in_place, remove_leftovers
from litgpt.checkpoint.folders import WEIGHTS_NAME, find_weights_file
from litgpt.checkpoint.hf_config import UnsupportedArchitecture, config_from_hf, read_hf_config
from litgpt.checkpoint.hub_repo import HubRepo, is_repo_id
from litgpt.checkpoint.hub_session import did_you_mean, find_named_config, is_offline, known_repo, offline_error
from litgpt.config import Config, save_config

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template*", "config.json", "generation_config.json",
)  # fmt: skip
MODEL_FILES = (*TOKENIZER_FILES, "prompt_style.yaml", "LICENSE*", "NOTICE*")
WEIGHT_FORMATS = (
    ("model.safetensors.index.json", "model.safetensors", r"model-\d+-of-\d+\.safetensors", "*.safetensors"),
    (None, WEIGHTS_NAME, "", None),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", r"pytorch_model-\d+-of-\d+\.bin", "*.bin"),
)
"""Best first: the index, the single file, the numbered shards without index, what the shards of an index may be."""

_WEIGHTS = re.compile(r"\.(safetensors|bin|pth)(\.\w+\.part)?$")


def download_repo(
    repo_id: str,
    checkpoint_dir: Path = Path("checkpoints"),
    *,
    access_token: str | None = None,
    revision: str | None = None,
    tokenizer_only: bool = False,
    model_name: str | None = None,
) -> Path:
    """Bring a model repo of the hub into `checkpoint_dir/repo_id`, with a model_config.yaml, and return that folder.

    Args:
        repo_id: `org/name` on the hub, or a named config.
        checkpoint_dir: Root of all checkpoints.
        access_token: For gated and private repos; default: HF_TOKEN or a saved login.
        revision: Branch, tag or commit; default: the newest.
        tokenizer_only: Leave the weights out.
        model_name: Named config that fills in what config.json does not say.

    Raises:
        ValueError: There is no such repo, it may not be read, or we lack a feature of its model.
        ConnectionError: The hub cannot be reached, or does not send what it announces.
        OSError: The disk is too small or not writable.
    """
    if "/" not in repo_id:
        repo_id = known_repo(repo_id) or repo_id
    if not is_repo_id(repo_id):
        raise ValueError(f"{repo_id!r} is no repo of the hub, which is called like org/name{did_you_mean(repo_id)}")
    target = Path(checkpoint_dir) / repo_id
    if is_offline():
        return _local(target, tokenizer_only, revision, offline_error(repo_id))
    try:
        repo = HubRepo(repo_id, access_token, revision)
    except ConnectionError as error:
        return _local(target, tokenizer_only, revision, error)
    place = target.resolve() if target.is_symlink() else target
    place.parent.mkdir(parents=True, exist_ok=True)
    staging = place.with_name(f".{place.name}.partial")
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        with lock:  # a second process waits, and then finds everything there
            remove_leftovers(place.parent)
            staging.mkdir(exist_ok=True)
            _download(repo, place, staging, tokenizer_only, model_name)
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        if not any(_WEIGHTS.search(path.name) for path in staging.glob("*")):
            shutil.rmtree(staging, ignore_errors=True)  # refused before it came to the weights
        if not staging.exists() and not place.exists():
            Path(lock.lock_file).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                place.parent.rmdir()  # succeeds only where nothing else is
    return target


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a model, all shards that an index names, and what describes them."""
    try:
        file = find_weights_file(folder)
        names = index_names(file) if file.name.endswith(".index.json") else []
    except (FileNotFoundError, ValueError):
        return False
    is_described = any((folder / name).is_file() for name in ("model_config.yaml", "config.json"))
    return is_described and all((folder / name).is_file() for name in names)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def choose_weights(names: Iterable[str]) -> list[str]:
    """Those of a repo's files that hold its weights, each weight once: safetensors, else lit_model.pth, else .bin.

    An index comes first; the files after it are those that it may name.
    """
    names = [name for name in names if not re.match("consolidated|adapter_|training_args|optimizer|scheduler", name)]
    for index, single, shards, pattern in WEIGHT_FORMATS:
        numbered = [name for name in names if re.fullmatch(shards, name)]
        if index in names:
            return [index, *(numbered or (name for name in fnmatch.filter(names, pattern) if name != single))]
        if single in names and (single != WEIGHTS_NAME or "model_config.yaml" in names):
            return [single]
        if numbered:
            return numbered
    found = fnmatch.filter(names, "*.safetensors")
    return found if len(found) == 1 else []


def _local(target: Path, tokenizer_only: bool, revision: str | None, error: ConnectionError) -> Path:
    """`target` as it is, if it will do while the hub cannot be asked; otherwise raises `error`."""
    if not (has_tokenizer(target) if tokenizer_only else has_weights(target)):
        raise error from None
    which = "whether it is the newest" if revision is None else f"whether it is revision {revision}"
    warnings.warn(f"{target} is taken as it is: {which} cannot be seen, for the hub cannot be asked", stacklevel=3)
    return target


def _download(repo: HubRepo, target: Path, staging: Path, tokenizer_only: bool, model_name: str | None) -> None:
    """Put the repo at `target`; whoever looks there sees all of it or what was there before."""
    kinds = TOKENIZER_FILES if tokenizer_only else MODEL_FILES
    small = [n for n in repo.files if any(fnmatch.fnmatchcase(n, kind) for kind in kinds) and not n.endswith(".py")]
    weights = [] if tokenizer_only else choose_weights(repo.files)
    _check_contents(repo, small, weights, tokenizer_only)
    if is_ours := weights == [WEIGHTS_NAME]:
        small.append("model_config.yaml")
    for name in small + weights:  # what an earlier download has left is checked like all else
        if (target / name).is_file() and not (staging / name).exists():
            _link(target / name, staging / name)
    repo.check_space(small + weights, staging)
    repo.download([name for name in (*small, *weights) if name.endswith(("config.json", ".index.json"))], staging)
    config = None if tokenizer_only or is_ours else _build_config(repo.repo_id, staging, model_name)
    weights = _named_by_index(repo, weights, staging)
    _check_converted(repo, weights, target)
    if lacking := repo.check_space(small + weights, staging):
        print(f"Downloading {tqdm.format_sizeof(lacking, 'B')} of {repo.repo_id} to {target}", file=sys.stderr)
    repo.download(small + weights, staging, show_progress=sys.stderr.isatty())

    wanted = {*small, *weights}
    is_there = all((target / name).is_file() and (target / name).samefile(staging / name) for name in wanted)
    if is_there and (tokenizer_only or (target / "model_config.yaml").is_file()):
        return
    for path in staging.iterdir():
        if path.name not in wanted:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if config is not None:
        save_config(config, staging)
    if target.is_dir():
        outdated = {*choose_weights(path.name for path in target.iterdir())} - {WEIGHTS_NAME} if weights else set()
        for path in target.iterdir():
            if path.name not in outdated and not (staging / path.name).exists():
                _link(path, staging / path.name)
    put_in_place(staging, target)


def _check_contents(repo: HubRepo, small: list[str], weights: list[str], tokenizer_only: bool) -> None:
    """Raise ValueError if the repo lacks what is wanted of it."""
    if tokenizer_only and not any(name.startswith(("tokenizer", "vocab")) for name in small):
        raise ValueError(f"{repo.repo_id} holds no tokenizer")
    if not tokenizer_only and not weights:
        kinds = [kind for kind in ("gguf", "h5", "msgpack") if any(name.endswith(f".{kind}") for name in repo.files)]
        only = f", only {' and '.join(kinds)}" if kinds else ""
        only = ", only an adapter for another model" if "adapter_config.json" in repo.files else only
        raise ValueError(f"{repo.repo_id} holds no model.safetensors or pytorch_model.bin{only}: choose another repo")


def _build_config(repo_id: str, folder: Path, model_name: str | None) -> Config:
    """The config of the model, by its config.json and the named config if there is one."""
    known = None
    if model_name or find_named_config(repo_id):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*by name alone.*")  # config.json says the rest
            known = Config.from_name(model_name or repo_id)
    if not (folder / "config.json").is_file():
        if known is None:
            raise ValueError(f"{repo_id} has no config.json: say what model it holds with --model_name")
        return known
    try:
        config = config_from_hf(read_hf_config(folder), name=known.name if known else None)
    except UnsupportedArchitecture as error:
        if known is None:
            raise UnsupportedArchitecture(f"{repo_id} cannot be used: {error}") from None
        return known
    except ValueError as error:
        raise ValueError(f"{repo_id} cannot be used: {error}") from None
    if known is None:
        org, _, name = repo_id.rpartition("/")
        config.name, config.hf_config = name, {"org": org, "name": name}
    return config


def index_names(path: Path) -> list[str]:
    """The shards that an index of weights names."""
    try:
        return sorted({str(name) for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path.name} is no index of weights") from None


def _named_by_index(repo: HubRepo, weights: list[str], folder: Path) -> list[str]:
    """`weights` without the files that their index does not name."""
    if not weights or not weights[0].endswith(".index.json"):
        return weights
    try:
        shards = index_names(folder / weights[0])
    except ValueError as error:
        raise ValueError(f"{repo.repo_id} cannot be used: {error}") from None
    if unknown := [name for name in shards if name not in repo.files]:
        raise ValueError(f"{weights[0]} of {repo.repo_id} names {unknown[0]!r}, which the repo does not hold")
    return [weights[0], *shards]


def _check_converted(repo: HubRepo, weights: list[str], target: Path) -> None:
    """Raise ValueError if `target` holds a lit_model.pth made from weights that are about to be replaced."""
    if WEIGHTS_NAME in weights or not (target / WEIGHTS_NAME).is_file():
        return
    for name in weights:
        if (target / name).is_file() and not repo.files[name].is_intact(target / name):
            raise ValueError(
                f"{target / WEIGHTS_NAME} goes with other weights than {repo.repo_id} has at {repo.commit[:12]}: move "
                f"{target} away, or choose another --checkpoint_dir"
            )


def _link(source: Path | str, to: Path | str) -> None:
    """A second name for a file, or for all files of a folder; a copy where the file system has no such thing."""
    if os.path.isdir(source) and not os.path.islink(source):
        shutil.copytree(source, to, symlinks=True, copy_function=_link)
        return
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, to, follow_symlinks=False)
