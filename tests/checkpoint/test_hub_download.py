import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import yaml
from hub_server import Trouble, running_hub

from litgpt.checkpoint import hub_repo, hub_session
from litgpt.checkpoint.hf_config import UnsupportedArchitecture
from litgpt.checkpoint.hub_download import choose_weights, download_repo, has_weights
from litgpt.config import Config

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {
    "config.json": json.dumps(LLAMA).encode(), "generation_config.json": b'{"eos_token_id": 2}',
    "tokenizer.json": b'{"version": "1.0"}', "tokenizer_config.json": b"{}", "README.md": b"# A model",
    "tokenizer_code.py": b"print('never fetched')",
}  # fmt: skip
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def content(seed: int, n_bytes: int = 300_000) -> bytes:
    """Bytes that look like weights."""
    return random.Random(seed).randbytes(n_bytes)


def model_files() -> dict[str, bytes]:
    """A repo of three shards, with all that real repos hold twice."""
    index = {"metadata": {}, "weight_map": {f"layer.{i}": name for i, name in enumerate(SHARDS)}}
    return {
        **SMALL, "model.safetensors.index.json": json.dumps(index).encode(), "LICENSE": b"Do what you like.",
        **{name: content(i) for i, name in enumerate(SHARDS)},
        "pytorch_model.bin": content(7), "consolidated.safetensors": content(8), "original/x.00.pth": content(9),
        "onnx/model.onnx": content(10), "model.fp16.safetensors": content(11), ".gitattributes": b"*.safetensors lfs",
    }  # fmt: skip


FETCHED = {*SMALL, *SHARDS, "model.safetensors.index.json", "LICENSE"} - {"README.md", "tokenizer_code.py"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub(monkeypatch, tmp_path) as hub:
        hub.add("org/model", model_files())
        yield hub


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def check_whole(folder: Path, files: dict[str, bytes]) -> None:
    """The folder holds what it should, byte by byte, and nothing is left beside it."""
    assert names(folder) == FETCHED | {"model_config.yaml"}
    for name in FETCHED:
        assert (folder / name).read_bytes() == files[name], name
    assert names(folder.parent) <= {folder.name, f".{folder.name}.lock"}


# What is fetched


def test_download_brings_safetensors_once_and_a_config(hub):
    folder = download_repo("org/model")
    assert folder == Path("checkpoints/org/model")
    check_whole(folder, model_files())
    config = Config.from_checkpoint(folder)
    assert (config.n_layer, config.n_embd, config.n_query_groups, config.name) == (2, 32, 2, "model")
    assert config.hf_config == {"org": "org", "name": "model"}


def test_config_comes_before_the_weights_and_decides(hub):
    hub.repos["org/model"].commit({"config.json": json.dumps({**LLAMA, "model_type": "starfish"}).encode()})
    with pytest.raises(UnsupportedArchitecture, match=r"org/model cannot be used: .*starfish") as caught:
        download_repo("org/model")
    assert "\n" not in str(caught.value)
    assert not hub.asked(".safetensors/")
    assert not Path("checkpoints/org").exists()


def test_feature_that_we_lack_is_named_before_the_weights_come(hub):
    hub.repos["org/model"].commit({"config.json": json.dumps({**LLAMA, "hidden_act": "swirl"}).encode()})
    with pytest.raises(ValueError, match=r"org/model cannot be used: .*activation 'swirl'"):
        download_repo("org/model")
    assert not hub.asked(".safetensors/")


def test_repo_of_a_named_config_keeps_its_name(hub):
    neox = {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 128, "num_hidden_layers": 6,
        "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 50304, "max_position_embeddings": 512,
        "rotary_pct": 0.25, "layer_norm_eps": 1e-5, "use_parallel_residual": True, "hidden_act": "gelu",
    }  # fmt: skip
    files = {**SMALL, "config.json": json.dumps(neox).encode(), "pytorch_model.bin": content(1)}
    hub.add("EleutherAI/pythia-14m", files)
    folder = download_repo("pythia-14m")
    assert folder == Path("checkpoints/EleutherAI/pythia-14m")
    assert Config.from_checkpoint(folder) == Config.from_name("pythia-14m")
    assert (folder / "pytorch_model.bin").read_bytes() == files["pytorch_model.bin"]


def test_repo_without_config_json_needs_a_model_name(hub):
    hub.add("org/bare", {"tokenizer.json": b"{}", "model.safetensors": content(1)})
    with pytest.raises(ValueError, match=r"org/bare has no config.json: .*--model_name"):
        download_repo("org/bare")
    folder = download_repo("org/bare", model_name="pythia-14m")
    assert Config.from_checkpoint(folder).name == "pythia-14m"


def test_tokenizer_only_leaves_weights_out_and_a_later_download_adds_them(hub):
    folder = download_repo("org/model", tokenizer_only=True)
    assert names(folder) == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not hub.asked(".safetensors/")
    n_asked = len(hub.asked("tokenizer.json"))
    download_repo("org/model")
    check_whole(folder, model_files())
    assert len(hub.asked("tokenizer.json")) == n_asked  # what is there and right is not fetched again


def test_tokenizer_may_be_had_of_a_model_that_we_do_not_know(hub):
    hub.add("org/starfish", {**SMALL, "config.json": b'{"model_type": "starfish"}', "model.safetensors": content(1)})
    assert (download_repo("org/starfish", tokenizer_only=True) / "tokenizer.json").is_file()


def test_litgpt_folder_on_the_hub_is_taken_as_it_is(hub):
    config = yaml.safe_dump({"name": "mine", "n_layer": 2}).encode()
    hub.add("org/mine", {"model_config.yaml": config, "lit_model.pth": content(1), "tokenizer.json": b"{}"})
    folder = download_repo("org/mine")
    assert names(folder) == {"model_config.yaml", "lit_model.pth", "tokenizer.json"}
    assert (folder / "model_config.yaml").read_bytes() == config


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin", "consolidated.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "optimizer.bin"], ["pytorch_model.bin"]),
        (["model.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"], ["model.safetensors"]),
        (["model-1-of-1.safetensors", "pytorch_model.bin"], ["model-1-of-1.safetensors"]),
        (["odd.safetensors"], ["odd.safetensors"]),
        (["one.safetensors", "other.safetensors"], []),
        (["lit_model.pth"], []),
        (["model.gguf"], []),
    ],
)  # fmt: skip
def test_weights_are_chosen_once_and_safetensors_first(there, chosen):
    assert choose_weights(there) == chosen


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"model-q4.gguf": b"GGUF"}, "only gguf"),
        ({"adapter_model.safetensors": b"x", "adapter_config.json": b"{}"}, "only an adapter for another model"),
        ({"README.md": b"x"}, "holds no model.safetensors"),
    ],
)
def test_repo_without_weights_says_what_it_has(hub, files, reason):
    hub.add("org/none", {"config.json": SMALL["config.json"], **files})
    with pytest.raises(ValueError, match=f"org/none .*{reason}"):
        download_repo("org/none")


@pytest.mark.parametrize(
    "name", ["../../evil.safetensors", "/tmp/evil.safetensors", "absent.safetensors", "a/b.safetensors"]
)
def test_index_that_points_elsewhere_is_refused(hub, name):
    index = json.dumps({"weight_map": {"w": SHARDS[0], "v": name}}).encode()
    hub.repos["org/model"].commit({"model.safetensors.index.json": index, "../../evil.safetensors": b"evil"})
    with pytest.raises(ValueError, match=r"index.json of org/model names '.*', which the repo does not hold"):
        download_repo("org/model")
    assert not hub.asked(".safetensors/")
    assert not list(Path().rglob("*evil*"))


@pytest.mark.parametrize("index", [b"[]", b"{", b'{"weight_map": 3}', b"[" * 100_000])
def test_broken_index_is_refused(hub, index):
    hub.repos["org/model"].commit({"model.safetensors.index.json": index})
    with pytest.raises(ValueError, match="is no index of weights"):
        download_repo("org/model")


def test_files_with_hostile_names_are_never_written(hub, tmp_path):
    evil = [
        "../tokenizer.json",
        "..\\tokenizer.txt",
        "/tokenizer.yaml",
        "tokenizer/../../x",
        ".tokenizer",
        "tokenizer\n.json",
    ]
    hub.repos["org/model"].commit({name: b"evil" for name in evil})
    check_whole(download_repo("org/model"), model_files())
    assert not any(path.read_bytes() == b"evil" for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "repo_id", ["../x", "org/../x", "org/a/b", "/etc/passwd", "org/.hidden", "o g/x", "org/x--y", "", "a" * 97]
)
def test_text_that_is_no_repo_id_is_refused_without_a_request(hub, repo_id):
    with pytest.raises(ValueError, match="is no repo of the hub, which is called like org/name"):
        download_repo(repo_id)
    assert not hub.requests


# Revisions and what is there already


def test_revision_is_pinned_and_all_files_come_from_one_commit(hub):
    repo = hub.repos["org/model"]
    old = repo.branches["main"]
    repo.commit({"tokenizer.json": b'{"version": "2.0"}'})
    repo.branches["v1"] = old
    assert (download_repo("org/model", revision="v1") / "tokenizer.json").read_bytes() == SMALL["tokenizer.json"]
    assert hub.asked(f"/resolve/{old}/") and not hub.asked("/resolve/v1/") and not hub.asked("/resolve/main/")
    assert (download_repo("org/model", revision=repo.branches["main"]) / "tokenizer.json").read_bytes() != SMALL[
        "tokenizer.json"
    ]


def test_unknown_revision_is_named(hub):
    with pytest.raises(ValueError, match="org/model has no revision 'v9'"):
        download_repo("org/model", revision="v9")


def test_second_download_fetches_nothing_and_changes_nothing(hub):
    folder = download_repo("org/model")
    (folder / "model_config.yaml").write_text("name: edited")
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    hub.requests.clear()
    download_repo("org/model")
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
    assert [path for _, path, _ in hub.requests] == ["/api/models/org/model"]
    assert names(folder.parent) == {"model", ".model.lock"}


def test_damaged_file_is_replaced_and_files_of_the_user_stay(hub):
    folder = download_repo("org/model")
    data = bytearray((folder / SHARDS[1]).read_bytes())
    data[1000] ^= 1
    (folder / SHARDS[1]).write_bytes(data)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    hub.requests.clear()
    download_repo("org/model")
    assert (folder / SHARDS[1]).read_bytes() == model_files()[SHARDS[1]]
    assert (folder / "notes" / "mine.txt").read_text() == "mine"
    assert len(hub.asked("/large/")) == 1


def test_new_shards_replace_those_of_the_old_revision(hub):
    folder = download_repo("org/model")
    files = hub.repos["org/model"].commits[hub.repos["org/model"].branches["main"]]
    for name in (*SHARDS, "model.safetensors.index.json"):
        del files[name]
    hub.repos["org/model"].commit({"model.safetensors": content(20)})
    download_repo("org/model")
    assert names(folder) == FETCHED - {*SHARDS, "model.safetensors.index.json"} | {
        "model.safetensors",
        "model_config.yaml",
    }


def test_converted_weights_are_not_left_beside_others(hub):
    folder = download_repo("org/model")
    (folder / "lit_model.pth").write_bytes(b"converted")
    download_repo("org/model")
    hub.repos["org/model"].commit({SHARDS[0]: content(30)})
    with pytest.raises(
        ValueError, match=r"lit_model.pth goes with other weights than org/model has at [0-9a-f]{12}: move"
    ):
        download_repo("org/model")
    assert (folder / "lit_model.pth").read_bytes() == b"converted"
    assert (folder / SHARDS[0]).read_bytes() == content(0)


def test_link_to_another_disk_is_followed(hub, tmp_path):
    (tmp_path / "big" / "place").mkdir(parents=True)
    Path("checkpoints/org").mkdir(parents=True)
    Path("checkpoints/org/model").symlink_to(tmp_path / "big" / "place")
    download_repo("org/model")
    assert Path("checkpoints/org/model").is_symlink()
    check_whole(tmp_path / "big" / "place", model_files())


# Broken connections and wrong content


def test_cut_connections_are_resumed_where_they_broke(hub):
    hub.troubles = [
        Trouble("/large/" + SHARDS[0], cut_after=100_000, times=2),
        Trouble("/large/" + SHARDS[2], cut_after=0),
    ]
    check_whole(download_repo("org/model"), model_files())
    ranges = [headers.get("range") for headers in hub.asked("/large/" + SHARDS[0])]
    assert ranges == [None, "bytes=100000-", "bytes=200000-"]


def test_server_without_ranges_sends_the_whole_file_again(hub):
    hub.knows_ranges = False
    hub.troubles = [Trouble("/large/" + SHARDS[0], cut_after=100_000)]
    check_whole(download_repo("org/model"), model_files())
    assert len(hub.asked("/large/" + SHARDS[0])) == 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("where", ["/api/models/", "config.json", "/large/"])
def test_busy_hub_is_asked_again(hub, status, where):
    hub.troubles = [Trouble(where, status=status, times=2)]
    check_whole(download_repo("org/model"), model_files())
    assert not hub.troubles[0].times


def test_hub_that_stays_busy_is_given_up_and_what_came_is_kept(hub):
    hub.troubles = [Trouble("/large/" + SHARDS[1], status=503, times=100)]
    with pytest.raises(
        ConnectionError, match="answers 503 for org/model: try later, the same command goes on where"
    ) as caught:
        download_repo("org/model")
    assert "\n" not in str(caught.value)
    assert len(hub.asked("/large/" + SHARDS[1])) == hub_session.N_ATTEMPTS
    assert not Path("checkpoints/org/model").exists()
    hub.troubles, n_asked = [], len(hub.asked("/large/" + SHARDS[0]))
    check_whole(download_repo("org/model"), model_files())
    assert len(hub.asked("/large/" + SHARDS[0])) == n_asked


def test_wait_that_the_hub_asks_for_is_kept(hub, monkeypatch):
    hub.troubles = [Trouble("/large/" + SHARDS[0], status=429, headers={"Retry-After": "1"})]
    before = time.monotonic()
    check_whole(download_repo("org/model"), model_files())
    assert time.monotonic() - before >= 1


def test_wait_that_is_too_long_is_told_instead(hub):
    hub.troubles = [Trouble("/api/", status=429, headers={"Retry-After": "3600"}, times=9)]
    with pytest.raises(ConnectionError, match="answers 429 for org/model and asks to wait 3600 seconds"):
        download_repo("org/model")
    assert len(hub.requests) == 1


@pytest.mark.parametrize("name", [SHARDS[0], "tokenizer.json", "model.safetensors.index.json"])
def test_wrong_content_is_fetched_once_more_and_then_refused(hub, name):
    hub.troubles = [Trouble(f"/large/{name}" if name in SHARDS else name, change=True)]
    check_whole(download_repo("org/model"), model_files())
    shutil.rmtree("checkpoints")
    hub.troubles[0].times = 100
    with pytest.raises(
        ConnectionError, match=f"{name} of org/model came twice with another content than http"
    ) as caught:
        download_repo("org/model")
    assert "\n" not in str(caught.value)
    assert not Path("checkpoints/org/model").exists()
    hub.troubles = []
    check_whole(download_repo("org/model"), model_files())


def test_login_page_instead_of_a_hub_is_said(hub):
    hub.troubles = [Trouble("/api/", status=200, body=b"<html>Log in</html>", times=9)]
    with pytest.raises(ConnectionError, match="is not that of a hub; is a login page or a proxy between"):
        download_repo("org/model")


def test_mirror_without_sizes_and_hashes_still_serves(hub):
    hub.tells_hashes = False
    check_whole(download_repo("org/model"), model_files())


def test_file_that_only_xet_serves_is_left_to_the_library(hub, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(hub_repo, "MAX_HTTP_BYTES", 1000)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)  # this hub knows no Xet: it falls back
    check_whole(download_repo("org/model"), model_files())


# The disk


def test_disk_is_checked_before_the_first_byte(hub, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(hub_repo.shutil, "disk_usage", lambda path: usage(10**6, 9 * 10**5, 500_000))
    with pytest.raises(
        OSError, match=r"org/model needs 9\d\d,\d\d\d bytes more in .*, and the disk has 500,000 free: make room"
    ) as caught:
        download_repo("org/model")
    assert "\n" not in str(caught.value)
    assert [path for _, path, _ in hub.requests] == ["/api/models/org/model"]
    assert not Path("checkpoints/org").exists()


def test_what_has_come_already_needs_no_room(hub, monkeypatch):
    hub.troubles = [Trouble("/large/" + SHARDS[1], status=503, times=100)]
    with pytest.raises(ConnectionError):
        download_repo("org/model")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(hub_repo.shutil, "disk_usage", lambda path: usage(10**6, 9 * 10**5, 320_000))
    hub.troubles = []
    check_whole(download_repo("org/model"), model_files())


def test_disk_that_fills_up_is_said_in_one_line_and_kept_for_the_next_run(hub, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hub_repo.HubRepo, "_receive", full)
        with pytest.raises(
            OSError, match=r"disk full while downloading org/model: free some space, the same command goes on"
        ):
            download_repo("org/model")
    check_whole(download_repo("org/model"), model_files())


# Kills and neighbours

FORKING = """
import os, signal, sys
from pathlib import Path
import huggingface_hub.utils, huggingface_hub.hf_api
from litgpt.checkpoint.hub_download import download_repo

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "ctypes.dlsym"}
WRITING = os.O_WRONLY | os.O_RDWR

def run(root, last_step):
    n_steps = 0

    def count(event, arguments):
        nonlocal n_steps
        if event in CHANGES or event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            n_steps += 1
            if n_steps == last_step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    download_repo("org/model", Path(root))
    Path(f"{root}.steps").write_text(str(n_steps))

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        root, last_step = line.split()
        try:
            run(root, int(last_step))
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Forker:
    """Runs downloads in processes that start at once, for all imports are done."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def download(self, checkpoint_dir: Path, kill_after: float | None = None, last_step: int = 0) -> int:
        """Status of the process; SIGKILL if it was killed, after so many seconds or changes of the disk."""
        self.process.stdin.write(f"{checkpoint_dir} {last_step}\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@pytest.mark.parametrize("n_kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_at_any_moment_leaves_no_folder_that_looks_complete(hub, tmp_path, n_kills):
    files, rng, forker, root = model_files(), random.Random(5), Forker(), tmp_path / "root"
    assert forker.download(tmp_path / "first") == 0  # now its imports are done
    hub.bytes_per_second = 1.5e6
    started = time.monotonic()
    assert forker.download(tmp_path / "undisturbed") == 0
    duration = time.monotonic() - started
    n_killed = n_resumed = 0
    try:
        while n_killed < n_kills:
            start = rng.choice([0, 0.8])  # half of the kills hit the end, where files get their names
            if forker.download(root, kill_after=rng.uniform(start, 1.0) * duration) == signal.SIGKILL:
                n_killed += 1
            if (root / "org" / "model").exists():
                check_files(root / "org" / "model", files)
            for path in root.glob("org/.model.partial/*"):  # a name without .part is a promise
                assert (
                    path.suffix == ".part" or path.name == "model_config.yaml" or path.read_bytes() == files[path.name]
                )
                n_resumed += path.suffix == ".part" and path.stat().st_size > 0
            if rng.random() < 0.5:
                hub.bytes_per_second = None
                assert forker.download(root) == 0
                check_whole(root / "org" / "model", files)
                shutil.rmtree(root)
                hub.bytes_per_second = 1.5e6
    finally:
        forker.close()
    assert n_resumed > 0


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_update", [False, True])
def test_kill_before_each_change_of_the_disk_leaves_all_or_nothing(hub, tmp_path, every, is_update):
    files, forker, root, old = model_files(), Forker(), tmp_path / "root", tmp_path / "old"
    before = {**files, SHARDS[1]: content(99)}
    hub.repos["org/model"].commit({SHARDS[1]: before[SHARDS[1]]})
    if is_update:
        assert forker.download(old) == 0
    hub.repos["org/model"].commit({SHARDS[1]: files[SHARDS[1]]})
    outcomes = set()
    try:
        shutil.copytree(old, root) if is_update else None
        assert forker.download(root) == 0
        n_steps = int(Path(f"{root}.steps").read_text())
        for step in sorted({*range(1, n_steps, every), *range(n_steps - 30, n_steps + 1, min(every, 4))}):
            shutil.rmtree(root)
            shutil.copytree(old, root) if is_update else None
            forker.download(root, last_step=step)
            folder = root / "org" / "model"
            is_new = folder.exists() and (folder / SHARDS[1]).read_bytes() == files[SHARDS[1]]
            if folder.exists():
                check_files(folder, files if is_new else before)
            assert folder.exists() or not is_update
            outcomes.add(is_new)
            assert forker.download(root) == 0
            check_whole(folder, files)
    finally:
        forker.close()
    assert outcomes == ({False, True} if is_update else {False})  # a new folder gets its name in the very last step


def check_files(folder: Path, files: dict[str, bytes]) -> None:
    assert names(folder) == FETCHED | {"model_config.yaml"}
    assert all((folder / name).read_bytes() == files[name] for name in FETCHED)


def test_two_at_once_share_one_download(hub):
    hub.bytes_per_second = 3e6
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(download_repo("org/model"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [Path("checkpoints/org/model")] * 3
    check_whole(folders[0], model_files())
    assert len(hub.asked("/large/")) == 3


# Who may read what


def test_gated_repo_without_token_says_where_to_ask(hub):
    hub.repos["org/model"].gated = True
    with pytest.raises(
        ValueError, match=r"org/model is gated: ask for access at http.*/org/model, then set HF_TOKEN"
    ) as caught:
        download_repo("org/model")
    assert "\n" not in str(caught.value)
    assert not Path("checkpoints/org").exists()


def test_gated_repo_with_a_token_without_access_says_so(hub, monkeypatch):
    hub.repos["org/model"].gated = True
    hub.readers["hf_secret"] = set()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(ValueError, match="is gated and the account of the access token may not read it") as caught:
        download_repo("org/model")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_token_opens_gated_repos_and_is_never_sent_elsewhere(hub, monkeypatch, how, tmp_path, capfd):
    hub.repos["org/model"].gated = True
    hub.readers["hf_secret"] = {"org/model"}
    if how == "environment":
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download_repo("org/model", access_token="hf_secret" if how == "argument" else None)
    assert all(headers["authorization"] == "Bearer hf_secret" for headers in hub.asked("/resolve/"))
    assert hub.asked("/large/") and not any("authorization" in headers for headers in hub.asked("/large/"))
    assert not any(b"hf_secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "secret" not in "".join(capfd.readouterr())


def test_refused_token_is_said_but_not_shown(hub):
    with pytest.raises(ValueError, match="the hub refuses the access token for org/model") as caught:
        download_repo("org/model", access_token="hf_expired")
    assert "expired?" in str(caught.value) and "hf_expired" not in str(caught.value)


@pytest.mark.parametrize("token", ["hf_\nsecret", "hf_s€cret", "hf secret"])
def test_token_that_cannot_be_one_is_not_shown(hub, token):
    with pytest.raises(ValueError, match="the access token holds characters that no token has") as caught:
        download_repo("org/model", access_token=token)
    assert "cret" not in str(caught.value)
    assert not hub.requests


@pytest.mark.parametrize(("token", "hint"), [(None, "or it is private and needs HF_TOKEN"), ("hf_x", "no model repo")])
def test_missing_repo_has_the_nearest_known_names(hub, token, hint):
    hub.readers["hf_x"] = set()
    with pytest.raises(ValueError, match="no model repo 'EleutherAI/pythia-14n'") as caught:
        download_repo("EleutherAI/pythia-14n", access_token=token)
    assert hint in str(caught.value) and "did you mean EleutherAI/pythia-14m" in str(caught.value)


def test_requests_tell_nothing_about_this_machine(hub):
    download_repo("org/model")
    agents = {headers["user-agent"] for _, _, headers in hub.requests}
    assert all(agent.startswith("litgpt/") and "torch" not in agent and "agent/" not in agent for agent in agents)
    assert {path.split("/")[1] for _, path, _ in hub.requests} == {"api", "org", "large"}
    assert not hub.asked("/api/agent-harnesses") and not hub.asked("/api/telemetry", "HEAD")


# Without a network


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_mode_takes_what_is_there_and_asks_nobody(hub, monkeypatch, variable):
    download_repo("org/model")
    hub.requests.clear()
    monkeypatch.setenv(variable, "1")
    with pytest.warns(UserWarning, match="is taken as it is"):
        assert download_repo("org/model") == Path("checkpoints/org/model")
    with pytest.raises(
        ConnectionError, match="org/other is not on this machine, and HF_HUB_OFFLINE forbids to fetch it"
    ):
        download_repo("org/other")
    assert not hub.requests


def test_hub_that_cannot_be_reached_is_one_line(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ConnectionError, match=r"cannot get org/model from http://127.0.0.1:9: .*; check the connection"
    ) as caught:
        download_repo("org/model")
    assert "\n" not in str(caught.value)


def test_what_is_there_serves_while_the_hub_cannot_be_reached(hub, monkeypatch):
    download_repo("org/model")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match="is taken as it is: whether it is the newest cannot be seen"):
        assert download_repo("org/model") == Path("checkpoints/org/model")
    with pytest.warns(UserWarning, match="whether it is revision v1 cannot be seen"):
        download_repo("org/model", revision="v1")


def test_folder_without_all_its_shards_is_no_checkpoint(hub):
    folder = download_repo("org/model")
    assert has_weights(folder)
    (folder / SHARDS[2]).unlink()
    assert not has_weights(folder)
    download_repo("org/model")
    check_whole(folder, model_files())
    (folder / "model.safetensors.index.json").write_text("[]")
    assert not has_weights(folder)
