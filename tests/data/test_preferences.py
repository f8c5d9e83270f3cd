import csv
import json
from itertools import pairwise

import pytest
import torch

from litgpt.data import Preferences
from litgpt.data.preferences import as_singles

PAIRS = [{"prompt": f"Say {n}", "chosen": f"good {n}", "rejected": f"bad {n} bad"} for n in range(10)]
SINGLES = [{"prompt": f"Say {n}", "completion": f"answer {n}", "label": n % 2 == 0} for n in range(10)]


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def connected(tmp_path, tokenizer):
    """Builds a data module on a file of rows, ready for use."""

    def build(rows, suffix=".json", unpaired=False, max_seq_length=64, vocab_size=None, batch_size=2, **values):
        path = write(tmp_path / f"rows{suffix}", rows)
        values = {"val_split_fraction": 0.2, "prompt_style": "default", "num_workers": 1, **values}
        data = Preferences(path, **values)
        data.unpaired = unpaired
        data.connect(tokenizer, batch_size, max_seq_length, vocab_size)
        data.prepare_data()
        data.setup()
        return data

    return build


def texts(tokenizer, ids, labels):
    """Text of the prompt and of what is compared."""
    return tokenizer.decode(ids[labels == -100]), tokenizer.decode(ids[labels != -100])


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_pairs_of_each_format_become_two_answers_to_one_prompt(suffix, connected, tokenizer):
    data = connected(PAIRS, suffix)
    assert (len(data.train_dataset), len(data.test_dataset)) == (8, 2)
    found = set()
    for example in data.train_dataset:
        prompt, chosen = texts(tokenizer, example["chosen_input_ids"], example["chosen_labels"])
        same_prompt, rejected = texts(tokenizer, example["rejected_input_ids"], example["rejected_labels"])
        assert prompt == same_prompt
        found.add((prompt, chosen, rejected))
    assert found < {(row["prompt"], row["chosen"], row["rejected"]) for row in PAIRS}


def test_answers_end_with_eos_which_is_compared_too(connected, tokenizer):
    example = connected(PAIRS).train_dataset[0]
    assert example["chosen_input_ids"][-1] == example["chosen_labels"][-1] == tokenizer.eos_id


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_single_answers_carry_their_label(suffix, connected, tokenizer):
    data = connected(SINGLES, suffix, unpaired=True)
    for example in [*data.train_dataset, *data.test_dataset]:
        prompt, answer = texts(tokenizer, example["input_ids"], example["labels"])
        assert answer == prompt.replace("Say", "answer")
        assert example["desirable"] == (int(answer[-1]) % 2 == 0)


def test_pairs_serve_as_single_answers(connected):
    data = connected(PAIRS, unpaired=True)
    assert (len(data.train_dataset), len(data.test_dataset)) == (16, 4)
    assert sum(example["desirable"] for example in data.train_dataset) == 8


@pytest.mark.parametrize("n", [4, 5, 10])
def test_single_answers_to_one_prompt_are_no_neighbours(n):
    prompts = [single["prompt"][0]["content"] for single in as_singles(PAIRS[:n])]
    assert sorted(prompts) == sorted(2 * [row["prompt"] for row in PAIRS[:n]])
    assert all(a != b for a, b in pairwise(prompts))


def test_chats_compare_the_last_answers_only(connected, tokenizer):
    shared = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    rows = [
        {
            "chosen": [*shared, {"role": "assistant", "content": f"Good bye {n}"}],
            "rejected": [*shared, {"role": "assistant", "content": "No"}],
        }
        for n in range(5)
    ]
    data = connected(rows, prompt_style="llama3", max_seq_length=400)
    example = data.train_dataset[0]
    assert texts(tokenizer, example["chosen_input_ids"], example["chosen_labels"])[1].startswith("Good bye")
    assert texts(tokenizer, example["rejected_input_ids"], example["rejected_labels"])[1].startswith("No")


def test_too_long_answers_are_cut_dropped_or_an_error(connected):
    rows = [*PAIRS, {"prompt": "Say it", "chosen": "long " * 40, "rejected": "short"}]
    with pytest.warns(UserWarning, match="1 cut to 32 tokens"):
        data = connected(rows, max_seq_length=32, val_split_fraction=0.0)
    assert max(len(example["chosen_input_ids"]) for example in data.train_dataset) == 32
    with pytest.warns(UserWarning, match="1 left out"):
        assert len(connected(rows, max_seq_length=32, val_split_fraction=0.0, too_long="drop").train_dataset) == 10
    with pytest.raises(ValueError, match="above the 32 of"):
        connected(rows, max_seq_length=32, val_split_fraction=0.0, too_long="error")


def test_pairs_whose_prompt_leaves_no_room_are_left_out(connected):
    rows = [*PAIRS, {"prompt": "Say it " * 40, "chosen": "a", "rejected": "b"}]
    with pytest.warns(UserWarning, match="1 left out"):
        assert len(connected(rows, max_seq_length=32, val_split_fraction=0.0).train_dataset) == 10
    with pytest.raises(ValueError, match="none is left"):
        connected(rows[-1:] * 3, max_seq_length=32, val_split_fraction=0.0)


def test_equal_answers_are_counted(connected):
    rows = [*PAIRS, {"prompt": "Say", "chosen": "same", "rejected": "same"}]
    with pytest.warns(UserWarning, match="1 have equal answers"):
        connected(rows, val_split_fraction=0.0)


@pytest.mark.parametrize(
    "row, message",
    [
        (SINGLES[0], "sample 11: is a single answer with a label.*use --loss kto"),
        ({"prompt": "a", "chosen": "b"}, "sample 11: needs the key 'rejected'"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "sample 11: 'chosen' is a int"),
        ({"chosen": "b", "rejected": "c"}, "sample 11: 'prompt' is missing"),
    ],
)
def test_rows_that_are_no_pair_are_named(row, message, connected):
    with pytest.raises(ValueError, match=message):
        connected([*PAIRS, row])


def test_label_that_is_neither_true_nor_false_is_named(connected):
    with pytest.raises(ValueError, match="'label' is 'maybe'"):
        connected([*SINGLES, {"prompt": "a", "completion": "b", "label": "maybe"}], unpaired=True)


def test_ids_beyond_the_vocabulary_are_refused(connected):
    with pytest.raises(ValueError, match="vocabulary ends at 99"):
        connected(PAIRS, vocab_size=100)


def test_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Preferences(tmp_path / "none.json")


def test_folder_with_splits_is_not_split_again(tmp_path, tokenizer):
    for name, rows in (("train", PAIRS[:7]), ("val", PAIRS[7:])):
        write(tmp_path / f"{name}.jsonl", rows)
    data = Preferences(tmp_path, prompt_style="default", num_workers=1)
    data.connect(tokenizer, 2, 64)
    data.setup()
    assert (len(data.train_dataset), len(data.test_dataset)) == (7, 3)
    data = Preferences(tmp_path, val_split_fraction=0.1)
    data.connect(tokenizer, 2, 64)
    with pytest.raises(ValueError, match="validation samples of its own"):
        data.setup()


def test_no_validation_sample_warns_and_gives_no_loader(connected):
    with pytest.warns(UserWarning, match="validation split has 0"):
        data = connected(PAIRS, val_split_fraction=0.0)
    assert data.val_dataloader() is None


def test_loader_gives_lists_of_examples_and_resumes_where_it_was(connected):
    data = connected(PAIRS)
    loader = data.train_dataloader()
    batches = list(loader)
    assert [len(batch) for batch in batches] == [2] * 4
    first = data.train_dataloader()
    iterator = iter(first)
    next(iterator)
    state = first.state_dict()
    again = data.train_dataloader()
    again.load_state_dict(state)
    rest = [example["chosen_input_ids"].tolist() for batch in again for example in batch]
    assert rest == [example["chosen_input_ids"].tolist() for batch in batches[1:] for example in batch]


def test_preview_shows_both_answers_and_what_is_compared(connected, capsys):
    connected(PAIRS, preview=1)
    out = capsys.readouterr().out
    assert "sample 1, chosen" in out and "sample 1, rejected" in out
    assert "Say" in out.split("[[")[1].split("]]")[0] and "]]good" in out


def test_example_prompt_is_the_prompt_without_an_answer(connected):
    data = connected(PAIRS, prompt_style="alpaca", max_seq_length=400)
    text = data.example_prompt(PAIRS[3])
    assert "Say 3" in text and text.endswith("### Response:\n") and "good" not in text


def test_reference_log_probs_are_kept_with_the_examples(connected):
    data = connected(PAIRS)
    data.reference_key = "key"
    data.train_dataset = None
    data.setup()
    assert data.train_dataset.reference is None
    table = torch.randn(8, 2)
    data.train_dataset.save_reference(table)
    data.train_dataset = None
    data.setup()
    assert torch.equal(data.train_dataset[5]["reference"], table[5])
    data.reference_key, data.train_dataset = "another", None
    data.setup()
    assert "reference" not in data.train_dataset[5]
