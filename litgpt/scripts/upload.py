"""The command `litgpt upload`."""

from pathlib import Path

from litgpt.checkpoint.hub import upload_folder


def setup(
    checkpoint_dir: Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    access_token: str | None = None,
    as_is: bool = False,
) -> None:
    """Upload a model to the Hugging Face hub, in one commit: weights, config, tokenizer; no logs, no step folders.

    Args:
        checkpoint_dir: Folder in Hugging Face format, as `litgpt convert_from_litgpt` writes it.
        repo_id: ORG/NAME on the hub; made if it is not there.
        private: Only you see the new repo.
        revision: Branch to upload to, made if it is not there; without it main.
        commit_message: What the history says about it.
        access_token: One that may write. Without it: the environment variable HF_TOKEN.
        as_is: Upload lit_model.pth too, or alone; only litgpt can read it.
    """
    url = upload_folder(
        Path(checkpoint_dir), repo_id, private=private, revision=revision, commit_message=commit_message,
        access_token=access_token, as_is=as_is,
    )  # fmt: skip
    print(
        f"Uploaded to {url}. Next, anywhere: litgpt download {repo_id}{f' --revision {revision}' if revision else ''}"
    )
