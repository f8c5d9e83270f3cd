"""The data sets that are a source and a form each: Alpaca2k, Deita, LIMA, LongForm, FLAN."""

import json
from dataclasses import fields

import pytest

from litgpt.data import FLAN, LIMA, Alpaca2k, Deita, LongForm, longform
from litgpt.data.deita import format_dataset as format_deita
from litgpt.data.flan import SUBSETS, load_jsonl
from litgpt.data.lima import format_dataset as format_lima
from litgpt.prompts import FLAN as FLANStyle
from litgpt.prompts import Longform
from tests.data.file_server import repo_files, running_server


def jsonl(rows):
    return "\n".join(map(json.dumps, rows)).encode()


def chat(n):
    roles = ("user", "assistant")
    return [{"role": roles[k % 2], "content": f"{n}-{k}"} for k in range(4)]


ALPACA = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(20)]
CHATS = [{"prompt_id": "x", "messages": chat(n)} for n in range(6)]
LIMAS = [{"conversations": [f"{n}-{k}" for k in range(4)], "source": "x"} for n in range(10)]
LONG = [{"input": f"Write {n}.", "output": "long " * n, "source": "x"} for n in range(1, 9)]
TASKS = [{"inputs": f"Is {n} even?", "targets": str(n % 2 == 0), "task": "x"} for n in range(8)]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    files = repo_files("mhenrichsen/alpaca_2k_test", {"alpaca_2000.jsonl": jsonl(ALPACA)})
    splits = {"train_sft": CHATS, "test_sft": CHATS[:2], "train_gen": [], "test_gen": []}
    files |= repo_files("HuggingFaceH4/deita-10k-v0-sft", {f"data/{k}-0.jsonl": jsonl(v) for k, v in splits.items()})
    files |= repo_files("GAIR/lima", {"train.jsonl": jsonl(LIMAS), "test.jsonl": b'{"conversations": ["a"]}'})
    files |= {"/long/train.json": json.dumps(LONG).encode(), "/long/val.json": json.dumps(LONG[:2]).encode()}
    for split in ("train", "test"):
        for task in ("cola", "rte"):
            files[f"/flan/{split}/{task}_10templates_{split}.jsonl"] = jsonl(TASKS[: 8 if split == "train" else 3])
    with running_server(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(longform, "_URL", f"{server.url}/long")
        yield server


def build(name, server, folder):
    return {
        "alpaca2k": lambda: Alpaca2k(download_dir=folder, val_split_fraction=0.25),
        "deita": lambda: Deita(download_dir=folder),
        "lima": lambda: LIMA(val_split_fraction=0.2),
        "longform": lambda: LongForm(download_dir=folder),
        "flan": lambda: FLAN(
            download_dir=folder, url=f"{server.url}/flan", subsets="cola_10templates, rte_10templates"
        ),
    }[name]()


SIZES = {"alpaca2k": (15, 5), "deita": (6, 2), "lima": (8, 2), "longform": (8, 2), "flan": (16, 6)}


@pytest.mark.parametrize("name", SIZES)
def test_data_set_trains_for_two_epochs_and_is_fetched_once(name, hub, tokenizer, tmp_path):
    for _ in range(2):
        data = build(name, hub, tmp_path / name)
        data.connect(tokenizer, batch_size=3)
        data.prepare_data()
        data.setup()
        n_requests = len(hub.requests)
    assert (len(data.train_dataset), len(data.test_dataset)) == SIZES[name]
    for _ in range(2):
        n = sum(len(batch["input_ids"]) for batch in data.train_dataloader())
        assert n >= SIZES[name][0]
        assert sum(len(batch["input_ids"]) for batch in data.val_dataloader()) == SIZES[name][1]
    assert all({"instruction", "output"} <= set(row) for row in data.test_dataset.data)
    assert len(hub.requests) == n_requests
    fetched = [path for path, _ in hub.requests]
    assert len(fetched) == len(set(fetched))


def test_published_fields():
    def defaults(module):
        return {f.name: f.default for f in fields(module)}

    assert str(defaults(Alpaca2k)["download_dir"]) == "data/alpaca2k"
    assert (
        defaults(Alpaca2k)["repo_id"] == "mhenrichsen/alpaca_2k_test"
        and defaults(Alpaca2k)["val_split_fraction"] == 0.05
    )
    assert defaults(Deita)["include_multiturn_conversations"] is False
    assert (
        defaults(Deita)["repo_id"] == "HuggingFaceH4/deita-10k-v0-sft"
        and str(defaults(Deita)["download_dir"]) == "data/deita"
    )
    assert defaults(LIMA)["repo_id"] == "GAIR/lima" and defaults(LIMA)["val_split_fraction"] == 0.1
    assert (
        str(defaults(LongForm)["download_dir"]) == "data/longform"
        and str(defaults(FLAN)["download_dir"]) == "data/flan"
    )
    assert defaults(FLAN)["subsets"] is None and len(set(SUBSETS)) == 66
    assert isinstance(LongForm().prompt_style, Longform) and isinstance(FLAN().prompt_style, FLANStyle)


def test_conversations_become_the_first_exchange_or_all():
    assert format_deita(CHATS[:1], False) == [{"instruction": "0-0", "input": "", "output": "0-1"}]
    both = [{"instruction": f"0-{k}", "input": "", "output": f"0-{k + 1}"} for k in (0, 2)]
    assert format_deita(CHATS[:1], True) == both
    assert format_lima(LIMAS[:1], False) == both[:1] and format_lima(LIMAS[:1], True) == both
    odd = [{"conversations": ["0-0", "0-1", "0-2"]}]
    assert format_lima(odd, True) == both[:1]


@pytest.mark.parametrize("module", [Deita, LIMA])
def test_multiturn_option_gives_more_samples(module, hub, tokenizer, tmp_path):
    sizes = []
    for multi in (False, True):
        data = module(include_multiturn_conversations=multi)
        if module is Deita:
            data.download_dir = tmp_path / "deita"
        data.connect(tokenizer)
        data.setup()
        sizes.append(len(data.train_dataset) + len(data.test_dataset))
    assert sizes[1] == 2 * sizes[0]


def test_unknown_subset_names_near_ones():
    with pytest.raises(ValueError, match=r"FLAN has no 'colla_10templates'; did you mean cola_10templates"):
        FLAN(subsets="colla_10templates")


def test_long_form_and_flan_rows_are_mapped_without_changing_them(hub, tokenizer, tmp_path):
    data = build("flan", hub, tmp_path / "flan")
    data.connect(tokenizer)
    data.setup()
    assert data.test_dataset.data[1] == {"instruction": "Is 1 even?", "output": "False"}
    assert load_jsonl(tmp_path / "flan" / "cola_10templates_test.jsonl") == TASKS[:3]
    data = build("longform", hub, tmp_path / "long")
    data.connect(tokenizer)
    data.setup()
    assert data.test_dataset.data[0] == {"instruction": "Write 1.", "output": "long "}


def test_gated_lima_without_a_token_says_so(monkeypatch, tmp_path, tokenizer):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with running_server(repo_files("GAIR/lima", {"train.jsonl": jsonl(LIMAS)}), token="t") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(ValueError, match="GAIR/lima is gated"):
            LIMA().prepare_data()
        LIMA(access_token="t").prepare_data()
    assert "access_token" not in repr(LIMA(access_token="t"))
