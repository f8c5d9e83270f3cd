import email.utils
import time

import pytest
from hub_server import Trouble, running_hub

from litgpt.checkpoint import hub_session
from litgpt.checkpoint.hub_session import (
    HubSession,
    did_you_mean,
    find_named_config,
    hub_endpoint,
    hub_repos,
    is_offline,
    known_repo,
    retry_after_seconds,
)
from litgpt.config import name_to_config


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub(monkeypatch, tmp_path) as hub:
        hub.add("org/model", {"config.json": b"{}"})
        yield hub


def answer_with(**headers: str) -> Exception:
    error = OSError()
    error.response = type("Response", (), {"headers": {key.replace("_", "-"): value for key, value in headers.items()}})
    return error


def test_known_repos_are_sorted_without_regard_to_case():
    repos = hub_repos()
    assert repos == sorted(repos, key=str.lower)
    assert {"EleutherAI/pythia-14m", "meta-llama/Meta-Llama-3-8B", "microsoft/phi-2"} <= set(repos)
    assert all(find_named_config(repo) for repo in repos)


@pytest.mark.parametrize(
    "name", ["Llama-3-8B", "Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3-8B"]
)
def test_every_spelling_finds_the_repo_of_a_named_config(name):
    assert known_repo(name) == "meta-llama/Meta-Llama-3-8B"


def test_another_organisation_is_not_taken_for_the_named_config():
    assert known_repo("someone/Llama-3-8B") is None
    assert all(find_named_config(name)["name"] == name for name in name_to_config)


@pytest.mark.parametrize(
    ("typo", "repo"),
    [
        ("EleutherAI/pythia-14n", "EleutherAI/pythia-14m"),
        ("pythia-14n", "EleutherAI/pythia-14m"),
        ("meta-lama/lama-3.2-1b", "meta-llama/Llama-3.2-1B"),
        ("microsoft/phi2", "microsoft/phi-2"),
    ],
)
def test_typo_has_the_nearest_repo(typo, repo):
    assert repo in did_you_mean(typo)


def test_name_like_none_is_sent_to_the_list():
    assert did_you_mean("zzzzzzzz/qqqqqqqq") == "; `litgpt download list` shows known ones"


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False)])
def test_offline_is_read_when_it_is_asked(monkeypatch, value, expected):
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert is_offline() is expected


def test_mirror_is_read_when_it_is_asked(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert hub_endpoint() == "https://mirror.example"
    monkeypatch.delenv("HF_ENDPOINT")
    assert hub_endpoint().startswith("https://")


def test_wait_is_read_in_all_its_forms():
    assert retry_after_seconds(answer_with(Retry_After="7")) == 7
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 50 < retry_after_seconds(answer_with(Retry_After=date)) <= 61
    assert retry_after_seconds(answer_with(RateLimit='"api";r=0;t=44')) == 44
    assert retry_after_seconds(answer_with(RateLimit='"api";r=5;t=44')) == 0
    assert retry_after_seconds(answer_with(Retry_After="soon")) == retry_after_seconds(OSError()) == 0


def test_pauses_grow_until_there_is_progress(hub, monkeypatch):
    session, pauses, received = HubSession("org/model"), [], [0, 0, 5, 5, 5]
    monkeypatch.setattr(session.stop, "wait", pauses.append)
    outcomes = [ConnectionError("cut")] * 5

    def act() -> str:
        if outcomes:
            raise outcomes.pop()
        return "done"

    assert session.patiently(act, n_received=lambda: received[4 - len(outcomes)], n_attempts=4) == "done"
    assert pauses == [0.01, 0.02, 0.01, 0.02, 0.04]


def test_request_is_given_up_once_another_has_failed(hub):
    session, calls = HubSession("org/model"), []
    session.stop.set()

    def act() -> None:
        calls.append(1)
        raise ConnectionError("cut")

    with pytest.raises(ConnectionError, match=r"^cut$"):
        session.patiently(act)
    assert len(calls) == 1


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "folder"), OSError(28, "No space left")])
def test_trouble_of_this_machine_is_not_tried_again(hub, error):
    calls = []

    def act() -> None:
        calls.append(1)
        raise error

    with pytest.raises(OSError, match=r"downloading org/model|cannot download org/model: Permission denied folder"):
        HubSession("org/model").patiently(act)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (403, ValueError, "the access token may not do this with org/model"),
        (410, ConnectionError, "answers 410 for org/model"),
        (451, ConnectionError, "answers 451 for org/model"),
        (500, ConnectionError, "answers 500 for org/model: try later"),
    ],
)
def test_status_is_explained_in_one_line(hub, status, kind, reason):
    hub.troubles = [Trouble("/api/", status=status, times=9, body=b'{"error": "first line\\nsecond line"}')]
    with pytest.raises(kind, match=reason) as caught:
        HubSession("org/model").read_info()
    assert "\n" not in str(caught.value)


def test_login_that_was_saved_stands_in_for_a_token(hub, monkeypatch, tmp_path):
    import huggingface_hub.constants

    (tmp_path / "token").write_text("hf_saved")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert HubSession("org/model").headers["authorization"] == "Bearer hf_saved"
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    assert HubSession("org/model").headers["authorization"] == "Bearer hf_environment"
    assert HubSession("org/model", "hf_given").headers["authorization"] == "Bearer hf_given"


def test_pause_is_patient_by_default():
    assert sum(hub_session.FIRST_PAUSE_SECONDS * 2**i for i in range(hub_session.N_ATTEMPTS - 1)) >= 30
