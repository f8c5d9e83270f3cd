import json
from pathlib import Path

import pytest
from hub_server import running_hub

from litgpt.__main__ import main

FILES = {
    "config.json": json.dumps({"model_type": "llama"}).encode(), "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256)) * 4,
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub(monkeypatch, tmp_path) as hub:
        hub.readers["hf_writer"] = {"*"}
        Path("mine").mkdir()
        for name, data in FILES.items():
            Path("mine", name).write_bytes(data)
        yield hub


def test_command_pushes_a_folder_and_says_how_it_comes_back(hub, capsys):
    main(["upload", "mine", "me/model", "--access_token", "hf_writer", "--private", "true", "--commit_message", "One"])
    repo = hub.repos["me/model"]
    assert repo.private and repo.messages == ["One"]
    assert repo.commits[repo.branches["main"]] == FILES
    captured = capsys.readouterr()
    last = f"Uploaded to {hub.url}/me/model/commit/{repo.branches['main']}. Next, anywhere: litgpt download me/model"
    assert captured.out.splitlines()[-1] == last
    assert "hf_writer" not in captured.out + captured.err


def test_command_pushes_to_a_branch(hub, capsys):
    hub.add("me/model", {"README.md": b"hello"})
    main(["upload", "mine", "me/model", "--access_token", "hf_writer", "--revision", "trial"])
    assert set(hub.repos["me/model"].commits[hub.repos["me/model"].branches["trial"]]) == {*FILES, "README.md"}
    assert capsys.readouterr().out.splitlines()[-1].endswith("litgpt download me/model --revision trial")


def test_failure_is_one_line_and_status_one(hub, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["upload", "mine", "me/model", "--access_token", "hf_nobody"])
    captured = capsys.readouterr()
    assert caught.value.code == 1 and len(captured.err.splitlines()) == 1
    assert "the hub refuses the access token" in captured.err and "hf_nobody" not in captured.err
