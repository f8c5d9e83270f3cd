"""The command `litgpt download`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from litgpt.checkpoint.hub_download import choose_weights, download_repo
from litgpt.checkpoint.hub_repo import HubRepo
from litgpt.checkpoint.hub_session import HubSession, hub_repos, import_hub


def download_from_hub(
    repo_id: str,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    convert_checkpoint: bool = False,
    dtype: str | None = None,
    checkpoint_dir: Path = Path("checkpoints"),
    model_name: str | None = None,
    revision: str | None = None,
) -> None:
    """Download a model from the Hugging Face hub, or go on with a download that broke off.

    Each file is checked against the hash that the hub announces. The folder appears when all is there, and every
    command reads it as it is.

    Args:
        repo_id: ORG/NAME on the hub, or a model that `litgpt models` lists; `list` shows the ones known by name.
        access_token: For gated and private models. Without it: the environment variable HF_TOKEN.
        tokenizer_only: Leave the weights out.
        convert_checkpoint: Also write lit_model.pth, for litgpt 0.5 and scripts that want one file.
        dtype: Type of the numbers in lit_model.pth, such as bfloat16; implies --convert_checkpoint true.
        checkpoint_dir: The model goes to the folder ORG/NAME in here.
        model_name: Named config for a model whose config.json does not say enough.
        revision: Branch, tag or commit; without it the newest.
    """
    if repo_id == "list":
        print("\n".join(hub_repos()))
        return
    folder = download_repo(
        repo_id, Path(checkpoint_dir), access_token=access_token, revision=revision, tokenizer_only=tokenizer_only,
        model_name=model_name,
    )  # fmt: skip
    if tokenizer_only:
        print(f"Tokenizer in {folder}. Next: litgpt pretrain NAME --tokenizer_dir {folder}")
        return
    if convert_checkpoint or dtype is not None:
        from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

        convert_hf_checkpoint(checkpoint_dir=folder, dtype=dtype)
    n_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    print(f"Model in {folder} ({tqdm.format_sizeof(n_bytes, 'B')}). Next: litgpt generate {folder} --prompt 'Hello'")


def find_weight_files(repo_id: str, access_token: str | None) -> tuple[list[str], list[str]]:
    """The `.bin` and the `.safetensors` files with the weights of a repo."""
    names = HubRepo(repo_id, access_token).files
    kinds = (".bin", ".safetensors")
    chosen = [choose_weights(n for n in names if n.endswith((kind, f"{kind}.index.json"))) for kind in kinds]
    bins, safetensors = ([name for name in found if not name.endswith(".json")] for found in chosen)
    return bins, safetensors


@contextlib.contextmanager
def gated_repo_catcher(repo_id: str, access_token: str | None) -> Iterator[None]:
    """Turn what the hub's library raises inside the block into one line with advice."""
    import_hub()
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise HubSession(repo_id, access_token).explained(error) from None
