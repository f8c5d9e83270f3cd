"""Requests to the Hugging Face hub: which to repeat, how long to wait, how to say in one line what is wrong."""

import datetime
import email.utils
import errno
import os
import re
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from litgpt.config import name_to_config, nearest

T = TypeVar("T")

N_ATTEMPTS = 6
"""Attempts without a single new byte; each new byte starts the count again."""
FIRST_PAUSE_SECONDS = 1.0
"""Pause before the second attempt; each further one is twice as long."""
MAX_PAUSE_SECONDS = 300.0
"""A hub that asks for a longer wait is not waited for."""
TIMEOUT_SECONDS = 30.0
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
AGAIN = "the same command goes on where it stopped"


def is_offline() -> bool:
    """Whether the environment forbids to ask the hub (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def hub_endpoint() -> str:
    """Address of the hub, or of the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def hub_repos() -> list[str]:
    """`org/name` of each model that has a named config, sorted without regard to case."""
    rows = (row["hf_config"] for row in name_to_config.values())
    return sorted({f"{row['org']}/{row['name']}" for row in rows}, key=str.lower)


def find_named_config(name: str) -> dict[str, Any] | None:
    """The row of the config table for its name, for a name on the hub, or for `org/name`."""
    org, _, short = name.rpartition("/")
    rows = ([name_to_config[name]] if name in name_to_config else []) + [*name_to_config.values()]
    for row in rows:
        if short in (row["name"], row["hf_config"]["name"]) and org in ("", row["hf_config"]["org"]):
            return row
    return None


def known_repo(name: str) -> str | None:
    """`org/name` of the weights of a named config."""
    row = find_named_config(name)
    return None if row is None else f"{row['hf_config']['org']}/{row['hf_config']['name']}"


def import_hub() -> Any:
    """`huggingface_hub`, set so that it tells nobody what runs here."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True  # it may have been imported before
    return huggingface_hub


def clean_token(access_token: str | None) -> str | None:
    """`access_token` without blanks around it; None where there is none."""
    token = (access_token or "").strip()
    if not re.fullmatch("[!-~]*", token):  # the HTTP library would show it in its complaint
        raise ValueError("the access token holds characters that no token has; copy it anew (it is not shown here)")
    return token or None


class HubSession:
    """The hub, asked about one repo. HF_TOKEN or a saved login stand in for a missing token when a request is made."""

    def __init__(self, repo_id: str, access_token: str | None = None, revision: str | None = None) -> None:
        hub = import_hub()
        from huggingface_hub.utils import build_hf_headers

        self.repo_id, self.revision = repo_id, revision
        self.stop = threading.Event()
        """Set when one of several transfers has failed, so that the others end too."""
        token = clean_token(access_token or os.environ.get("HF_TOKEN"))
        self.headers: dict[str, str] = build_hf_headers(token=token, library_name="litgpt")
        self.api = hub.HfApi(endpoint=hub_endpoint(), token=token, library_name="litgpt")

    @property
    def has_token(self) -> bool:
        """Whether requests carry a token."""
        return "authorization" in self.headers

    def read_info(self) -> Any:
        """What the hub says about the repo: `sha`, and `siblings` with sizes and hashes."""

        def ask() -> Any:
            try:
                return self.api.model_info(
                    self.repo_id, revision=self.revision, files_metadata=True, timeout=TIMEOUT_SECONDS
                )
            except (KeyError, TypeError, ValueError) as error:
                if hasattr(error, "response"):
                    raise
                raise ConnectionError("its answer is not that of a hub; is a login page or a proxy between?") from None

        return self.patiently(ask, n_attempts=3)

    def patiently(
        self, act: Callable[[], T], n_received: Callable[[], int] = lambda: 0, n_attempts: int = N_ATTEMPTS
    ) -> T:
        """What `act()` returns; repeated, with pauses, while what fails may pass.

        Args:
            act: A request.
            n_received: How far it has come. Progress starts the count of attempts again.
            n_attempts: So often without progress.

        Raises:
            ValueError, ConnectionError, OSError: In one line, without the token.
        """
        import_hub()
        from huggingface_hub.errors import HfHubHTTPError

        http_error = HfHubHTTPError.__bases__[0]  # root of the HTTP library's errors, which changes with the version
        n_failures = farthest = 0
        while True:
            try:
                return act()
            except (http_error, OSError) as error:
                if self.stop.is_set():
                    raise
                if (now := n_received()) > farthest:
                    n_failures, farthest = 0, now
                n_failures += 1
                pause = pause_seconds(error, n_failures)
                if pause is None or n_failures >= n_attempts or pause > MAX_PAUSE_SECONDS:
                    raise self.explained(error) from None
                self.stop.wait(pause)

    def explained(self, error: Exception) -> Exception:
        """The error that a user gets to see for `error`."""
        from huggingface_hub import errors

        repo, where, token = self.repo_id, hub_endpoint(), "HF_TOKEN (or --access_token)"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.OfflineModeIsEnabled):
            return offline_error(repo)
        if isinstance(error, errors.GatedRepoError):
            if not self.has_token:
                return ValueError(
                    f"{repo} is gated: ask for access at {where}/{repo}, then set {token} to a token of yours from "
                    f"{where}/settings/tokens"
                )
            return ValueError(
                f"{repo} is gated and the account of the access token may not read it: ask for access at "
                f"{where}/{repo} and wait until it is granted; a fine-grained token must allow gated repos"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return ValueError(f"{repo} has no revision {self.revision!r}; {where}/{repo}/commits lists them")
        if status == 401 and self.has_token:
            return ValueError(f"the hub refuses the access token for {repo}: is {token} right and not expired?")
        if status == 403:
            return ValueError(
                f"the access token may not do this with {repo}: {where}/settings/tokens gives permissions"
            )
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            private = "" if self.has_token else f", or it is private and needs {token}"
            return ValueError(f"the hub has no model repo {repo!r}{private}{did_you_mean(repo)}")
        if status is not None and status not in TRANSIENT_STATUS:
            return ConnectionError(f"{where} answers {status} for {repo}; {AGAIN}, should it be for a while only")
        if status is not None:
            wait = retry_after_seconds(error)
            when = f" and asks to wait {wait:.0f} seconds" if wait else ""
            return ConnectionError(f"{where} answers {status} for {repo}{when}: try later, {AGAIN}")
        if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
            if error.errno == errno.ENOSPC:
                return OSError(f"disk full while downloading {repo}: free some space, {AGAIN}")
            return OSError(f"cannot download {repo}: {error.strerror or error} {error.filename or ''}".rstrip())
        reason = " ".join(str(error).split()) or type(error).__name__
        return ConnectionError(f"cannot get {repo} from {where}: {reason}; check the connection, {AGAIN}")


def offline_error(repo_id: str) -> ConnectionError:
    """For a repo that is not at hand while the network must not be used."""
    return ConnectionError(
        f"{repo_id} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it: unset it, or bring the folder here"
    )


def did_you_mean(repo_id: str) -> str:
    """The nearest known repos, as the end of an error message."""
    by_name = {repo.rpartition("/")[2]: repo for repo in reversed(hub_repos())}
    close = nearest(repo_id, hub_repos()) or [by_name[name] for name in nearest(repo_id.rpartition("/")[2], by_name)]
    return f"; did you mean {' or '.join(close)}?" if close else "; `litgpt download list` shows known ones"


def pause_seconds(error: Exception, n_failures: int) -> float | None:
    """How long to wait before the next attempt; None if there is no point in one."""
    import_hub()
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    usual = FIRST_PAUSE_SECONDS * 2 ** (n_failures - 1)
    if isinstance(error, HfHubHTTPError):
        return max(usual, retry_after_seconds(error)) if error.response.status_code in TRANSIENT_STATUS else None
    if isinstance(error, OfflineModeIsEnabled):
        return None
    is_ours = isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError))
    return None if is_ours else usual  # a disk does not mend itself


def retry_after_seconds(error: Exception) -> float:
    """The wait that the answer asks for (Retry-After, or the hub's own RateLimit header); 0 if none."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
        return max(0.0, (until - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
    except (TypeError, ValueError):
        match = re.search(r"r=0;t=(\d+)", headers.get("RateLimit", "").replace(" ", ""))
        return float(match[1]) if match else 0.0
