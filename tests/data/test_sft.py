import json
import pickle
import warnings
from dataclasses import dataclass, fields

import pytest
import torch

from litgpt.chat_template import ChatTemplate
from litgpt.data import sft
from litgpt.data.sft import SFTDataModule, SFTDataset, get_sft_collate_fn, marked_text, split_samples
from litgpt.prompts import Alpaca, Default, PromptStyle
from litgpt.tokenizer import Tokenizer
from tests.chat_templates import CONVERSATIONS, PLAIN, write_chat_tokenizer

ROWS = [{"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(n)))} for n in range(1, 31)]


class Words:
    """A tokenizer with an id for each letter, BOS 1 and EOS 2."""

    use_bos, vocab_size, bos_id, eos_id = True, 200, 1, 2

    def encode(self, text, device=None, bos=None, eos=False, max_length=-1):
        ids = [1] * (bos is not False) + [min(ord(letter), 199) for letter in text] + [2] * eos
        return torch.tensor(ids[:max_length] if max_length > 0 else ids, dtype=torch.int)

    def decode(self, ids):
        return "".join(chr(i) for i in ids.tolist() if i > 2)


class Shout(PromptStyle):
    """A style of a user's own that uses a key of the sample."""

    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return prompt.upper() + kwargs.get("mood", "") + ":"


def expected(sample, style, mask, limit, ignore_index):
    prompt = Words().encode(style.apply(sample["instruction"], **sample)).tolist()
    answer = Words().encode(sample["output"], bos=False, eos=True).tolist()
    ids = prompt + answer
    labels = [ignore_index] * len(prompt) + answer if mask else ids
    return (ids[:limit], labels[:limit]) if limit > 0 else (ids, labels)


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("ignore_index", [-100, -1])
@pytest.mark.parametrize("max_seq_length", [-1, 5, 12, 1000])
@pytest.mark.parametrize("style", [Alpaca(), Default(), Shout()])
def test_dataset_is_prompt_answer_and_eos(mask_prompt, ignore_index, max_seq_length, style):
    sample = {"instruction": "abc", "input": "", "output": "de f", "mood": "!"}
    dataset = SFTDataset([sample], Words(), style, max_seq_length, mask_prompt, ignore_index)
    example = dataset[0]
    ids, labels = expected({**sample}, style, mask_prompt, max_seq_length, ignore_index)
    assert example["input_ids"].dtype == example["labels"].dtype == torch.int64
    assert (example["input_ids"].tolist(), example["labels"].tolist()) == (ids, labels)
    raw = len("abc") + 1 + len("de f") + 1
    assert example["token_counts"]["raw"] == (min(raw, max_seq_length) if max_seq_length > 0 else raw)
    assert example["token_counts"]["raw_plus_prompt_template"] == len(ids)
    assert set(example) == {"input_ids", "labels", "token_counts"} and len(dataset) == 1


def test_style_by_name_and_published_defaults():
    dataset = SFTDataset(ROWS, Words(), "alpaca")
    assert isinstance(dataset.prompt_style, Alpaca) and dataset.mask_prompt and dataset.max_seq_length == -1
    assert dataset.data is ROWS and (dataset[3]["labels"] == -100).any()


def test_transform_gets_a_copy_so_that_it_may_take_keys_out():
    rows = [{"inputs": "a", "targets": "b"}]

    def rename(row):
        row["instruction"], row["output"] = row.pop("inputs"), row.pop("targets")
        return row

    dataset = SFTDataset(rows, Words(), Default(), transform=rename)
    first, again = dataset[0], dataset[0]
    assert torch.equal(first["input_ids"], again["input_ids"]) and rows == [{"inputs": "a", "targets": "b"}]


def test_sample_without_output_is_named():
    dataset = SFTDataset([ROWS[0], {"instruction": "a"}], Words(), "alpaca")
    with pytest.raises(ValueError, match="the key 'output' is missing"):
        dataset[1]
    with pytest.raises(ValueError, match=r"^sample 2: .*the key 'output' is missing"):
        dataset.prepare(None)


def test_prepared_examples_are_the_same_and_are_kept(tmp_path, tokenizer, capsys):
    dataset = SFTDataset(ROWS, tokenizer, "alpaca", 100)
    before = [dataset[i] for i in range(len(dataset))]
    for _ in range(2):
        dataset = SFTDataset(ROWS, tokenizer, "alpaca", 100).prepare(tmp_path)
        for old, new in zip(before, (dataset[i] for i in range(len(dataset))), strict=True):
            assert all(torch.equal(old[key], new[key]) for key in ("input_ids", "labels"))
            assert old["token_counts"] == new["token_counts"]
        assert dataset.lengths.tolist() == [len(example["input_ids"]) for example in before]
    assert "Using 30 examples tokenised before" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.examples"))) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"max_seq_length": 90},
        {"mask_prompt": False},
        {"ignore_index": -1},
        {"prompt_style": "flan"},
        {"train_on": "last"},
        {"too_long": "drop"},
        {"vocab_size": 1000},
        {"transform": lambda row: {**row, "output": "one"}},
        {"data": ROWS[1:]},
    ],
)
def test_any_other_setting_has_another_cached_file(change, tmp_path, tokenizer):
    settings = {"data": ROWS, "tokenizer": tokenizer, "prompt_style": "alpaca", "max_seq_length": 400}
    SFTDataset(**settings).prepare(tmp_path)
    SFTDataset(**{**settings, **change}).prepare(tmp_path)
    assert len(list(tmp_path.glob("*.examples"))) == 2


def test_transforms_that_differ_in_a_constant_only_are_told_apart(tmp_path, tokenizer):
    for word in ("one", "two"):
        make = {"one": lambda row: {**row, "output": "one"}, "two": lambda row: {**row, "output": "two"}}[word]
        dataset = SFTDataset(ROWS[:1], tokenizer, "alpaca", transform=make).prepare(tmp_path)
        answer = dataset[0]["input_ids"][dataset[0]["labels"] != -100]
        assert tokenizer.decode(answer) == word


def test_templates_that_differ_have_other_cached_files(tmp_path, tokenizer):
    for text in ("a", "b"):
        template = ChatTemplate("{% for m in messages %}" + text + "{{ m.content }}{% endfor %}")
        SFTDataset(ROWS, tokenizer, template).prepare(tmp_path)
    assert len(list(tmp_path.glob("*.examples"))) == 2


def test_collate_pads_on_the_right_and_cuts():
    dataset = SFTDataset(ROWS[:3], Words(), Default())
    examples = [dataset[i] for i in range(3)]
    longest = max(len(e["input_ids"]) for e in examples)
    batch = get_sft_collate_fn(pad_id=9, ignore_index=-1)(examples)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, longest)
    for row, (example, ids, labels) in enumerate(zip(examples, batch["input_ids"], batch["labels"])):
        n = len(example["input_ids"])
        assert torch.equal(ids[:n], example["input_ids"]) and (ids[n:] == 9).all()
        assert torch.equal(labels[:n], example["labels"]) and (labels[n:] == -1).all()
        counts = batch["token_counts"]
        assert counts["raw"].shape == counts["raw_plus_prompt_template"].shape == (3, 1)
        assert counts["raw_plus_prompt_template"][row].item() == n
    cut = get_sft_collate_fn(max_seq_length=4)(examples)
    assert cut["input_ids"].shape == cut["labels"].shape == (3, 4)
    assert get_sft_collate_fn()(examples)["labels"][0, -1] == -100
    pickle.loads(pickle.dumps(get_sft_collate_fn(7)))(examples)


@dataclass(kw_only=True)
class Counting(SFTDataModule):
    """The rows above."""

    n_val: int = 4

    def load_samples(self):
        return ROWS[self.n_val :], ROWS[: self.n_val]


def connected(tokenizer, length=None, batch_size=4, vocab_size=None, **settings):
    data = Counting(**settings)
    data.connect(tokenizer, batch_size, length, vocab_size=vocab_size)
    data.prepare_data()
    data.setup()
    return data


def test_published_fields_have_their_published_defaults():
    found = {f.name: f.default for f in fields(SFTDataModule)}
    published = dict(mask_prompt=False, prompt_style="alpaca", ignore_index=-100, seed=42, num_workers=4)
    published |= dict(tokenizer=None, batch_size=1, max_seq_length=-1, train_dataset=None, test_dataset=None)
    assert {name: found[name] for name in published} == published


def test_loaders_give_published_batches(tokenizer):
    data = connected(tokenizer, mask_prompt=True)
    train, val = list(data.train_dataloader()), list(data.val_dataloader())
    assert [b["input_ids"].size(0) for b in train] == [4] * 7 and [b["input_ids"].size(0) for b in val] == [4]
    assert set(train[0]) == {"input_ids", "labels", "token_counts"}
    assert data.test_dataset.data[0]["instruction"] == "Count to 1."
    first = data.test_dataset[0]
    assert torch.equal(val[0]["input_ids"][0, : len(first["input_ids"])], first["input_ids"])
    order = [b["token_counts"]["raw"].flatten().tolist() for b in train]
    assert order != [
        b["token_counts"]["raw"].flatten().tolist() for b in connected(tokenizer, seed=1).train_dataloader()
    ]


def test_packed_batches_are_one_row_with_segments(tokenizer):
    data = connected(tokenizer, 300, pack=True, mask_prompt=True)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["segment_ids"].shape
    assert batch["input_ids"].size(0) == 1 and batch["segment_ids"].max() >= 3


def test_batches_grouped_by_length_are_padded_less(tokenizer):
    def padding(**settings):
        batches = list(connected(tokenizer, **settings).train_dataloader())
        return sum(b["input_ids"].numel() - b["token_counts"]["raw_plus_prompt_template"].sum().item() for b in batches)

    assert padding(group_by_length=True) < 0.5 * padding()


def test_packing_and_grouping_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        Counting(pack=True, group_by_length=True)


def test_too_long_samples_are_cut_dropped_or_refused(tokenizer):
    limit = 170
    lengths = SFTDataset(ROWS[4:], tokenizer, "alpaca", mask_prompt=False).lengths
    n_long = int((lengths > limit).sum())
    assert 0 < n_long < len(lengths)
    with pytest.warns(UserWarning, match=rf"of 26 training samples: {n_long} cut to 170 tokens"):
        data = connected(tokenizer, limit)
    assert data.train_dataset.lengths.max() == limit and len(data.train_dataset) == 26
    with pytest.warns(UserWarning, match=rf"{n_long} left out, as they are longer than 170 tokens"):
        data = connected(tokenizer, limit, too_long="drop")
    assert len(data.train_dataset) == 26 - n_long and len(data.train_dataset.data) == 26
    assert sum(len(b["input_ids"]) for b in data.train_dataloader()) >= 26 - n_long
    with pytest.raises(ValueError, match=r"sample \d+: has \d+ tokens, more than the 170 of --train.max_seq_length"):
        connected(tokenizer, limit, too_long="error")


def test_all_samples_too_long_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="all 26 training samples have more than 5 tokens"):
        connected(tokenizer, 5, too_long="drop")


def test_samples_that_teach_nothing_are_counted_or_refused(tokenizer):
    with pytest.raises(ValueError, match=r"nothing is learnt from any of the 26 training samples.*26 were cut before"):
        connected(tokenizer, 5, mask_prompt=True)
    with pytest.raises(ValueError, match=r"nothing is learnt.*see --data\.train_on"):
        connected(tokenizer, train_on="marked")


def test_ids_beyond_the_vocabulary_of_the_model_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"sample 1: the tokenizer gives id \d+, the model's vocabulary ends at 99"):
        connected(tokenizer, vocab_size=100)
    connected(tokenizer, vocab_size=tokenizer.vocab_size)


def test_validation_split_of_no_sample_warns_and_has_no_loader(tokenizer):
    with pytest.warns(UserWarning, match="validation split has 0 of 30 samples, so there will be no validation loss"):
        data = connected(tokenizer, n_val=0)
    assert data.val_dataloader() is None and len(data.test_dataset) == 0
    assert len(list(data.train_dataloader())) == 8


def test_no_training_sample_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="no sample is left for training"):
        connected(tokenizer, n_val=30)


def test_preview_marks_what_is_not_learnt(tokenizer, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        connected(tokenizer, preview=2, mask_prompt=True)
    out = capsys.readouterr().out
    assert out.count("--- sample") == 2
    text = Alpaca().apply(ROWS[4]["instruction"])
    assert f"[[{text}]]0 1 2 3 4" in out.replace("<|endoftext|>", "")


def test_preview_is_dim_on_a_terminal(tokenizer, monkeypatch):
    monkeypatch.setattr(sft.sys.stdout, "isatty", lambda: True, raising=False)
    ids = tokenizer.encode("the cat", bos=False)
    assert marked_text(tokenizer, ids, torch.zeros(len(ids), dtype=torch.bool)) == "\033[2mthe cat\033[0m"
    assert marked_text(tokenizer, ids, torch.ones(len(ids), dtype=torch.bool)) == "the cat"


def test_template_of_the_tokenizer_as_prompt_style(tmp_path):
    tokenizer = Tokenizer(write_chat_tokenizer(tmp_path, PLAIN["chatml"]))
    data = connected(tokenizer, prompt_style="template", mask_prompt=True)
    assert isinstance(data.prompt_style, ChatTemplate)
    assert data.example_prompt(ROWS[0]) == "<|im_start|>user\nCount to 1.<|im_end|>\n<|im_start|>assistant\n"
    assert data.example_prompt({"messages": CONVERSATIONS[2]}).endswith(
        "<|im_start|>user\nOnce upon a time<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_where_there_is_none_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="has no chat template"):
        connected(tokenizer, prompt_style="template")


def test_unknown_style_is_named_at_once():
    with pytest.raises(ValueError, match="There is no prompt style 'alpacca'"):
        Counting(prompt_style="alpacca")


def test_split_is_the_published_one():
    torch_split = torch.utils.data.random_split(ROWS, [0.9, 0.1], torch.Generator().manual_seed(42))
    assert split_samples(ROWS, 0.1, 42) == tuple(list(part) for part in torch_split)
    assert split_samples(ROWS, 0, 42)[1] == []
    with pytest.raises(ValueError, match=r"--data\.val_split_fraction is 1\.5"):
        split_samples(ROWS, 1.5, 42)


def test_samples_are_left_as_they_were(tokenizer):
    before = json.dumps(ROWS)
    list(connected(tokenizer).train_dataloader())
    assert json.dumps(ROWS) == before
