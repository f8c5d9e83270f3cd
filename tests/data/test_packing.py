import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt import GPT, Config
from litgpt.data.packing import PackedRows, as_one_row, best_fit_decreasing, concatenate


def naive_best_fit(lengths, capacity):
    """Rooms left in the rows, one item at a time."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(capacity=st.integers(1, 40), data=st.data())
@settings(max_examples=150, deadline=None)
def test_rows_filled_in_bulk_equal_best_fit_one_by_one(capacity, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), np.int64)
    rows, n_rows = best_fit_decreasing(np.bincount(lengths, minlength=capacity + 1), capacity)
    taken = np.bincount(rows, np.sort(lengths)[::-1], minlength=n_rows)
    assert sorted(capacity - taken) == naive_best_fit(lengths.tolist(), capacity)


def test_a_million_lengths_take_seconds_and_fill_the_rows():
    lengths = np.random.default_rng(0).lognormal(4.6, 0.7, 1_000_000).astype(np.int64).clip(5, 2048)
    start = time.perf_counter()
    rows = PackedRows(lengths, 2048)
    rows.documents(0, 1, 0)
    assert time.perf_counter() - start < 15  # 1 to 2 on an idle core
    assert rows.fill > 0.999


@pytest.mark.parametrize("epoch", [0, 1])
def test_rows_hold_each_document_once_and_no_more_than_fits(epoch):
    lengths = np.random.default_rng(1).integers(1, 40, 300)
    rows = PackedRows(lengths, 64)
    documents = [rows.documents(row, 7, epoch) for row in range(len(rows))]
    assert sorted(np.concatenate(documents).tolist()) == list(range(300))
    assert max(lengths[row].sum() for row in documents) <= 64
    assert rows.fill > 0.97


def test_rows_follow_from_seed_and_epoch():
    lengths = np.random.default_rng(1).integers(1, 20, 200)

    def read(seed, epoch):
        rows = PackedRows(lengths, 64)
        return [rows.documents(row, seed, epoch).tolist() for row in range(len(rows))]

    def companies(rows):
        return {frozenset(row) for row in rows}

    assert read(1, 0) == read(1, 0)
    assert len(companies(read(1, 0)) & companies(read(1, 1))) < 5
    assert len(companies(read(1, 0)) & companies(read(2, 0))) < 5


def test_rows_of_several_epochs_can_be_read_in_turns():
    rows = PackedRows(np.random.default_rng(1).integers(1, 20, 50), 32)
    first = [rows.documents(0, 1, epoch).tolist() for epoch in range(5)]
    assert [rows.documents(0, 1, epoch).tolist() for epoch in range(5)] == first


def test_a_document_longer_than_a_row_has_one_for_itself():
    rows = PackedRows(np.array([100, 3, 64, 5]), 64)
    documents = sorted(sorted(rows.documents(row, 0, 0).tolist()) for row in range(len(rows)))
    assert documents == [[0], [1, 3], [2]]


def test_a_row_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"row of 0 tokens.*--train.max_seq_length"):
        PackedRows(np.array([1]), 0)


def make_documents(lengths, vocab=300):
    generator = torch.Generator().manual_seed(0)
    documents = []
    for length in lengths:
        ids = torch.randint(1, vocab, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        documents.append({"input_ids": ids, "labels": labels, "token_counts": {"raw": length, "all": 2 * length}})
    return documents


def test_concatenated_documents_keep_their_tokens_and_never_predict_the_next_first():
    documents = make_documents([4, 2, 5])
    documents[1]["labels"] = documents[1]["input_ids"].clone()
    packed = concatenate(documents)
    assert torch.equal(packed["input_ids"], torch.cat([d["input_ids"] for d in documents]))
    assert packed["segment_ids"].tolist() == [0] * 4 + [1] * 2 + [2] * 5
    assert packed["labels"][[0, 4, 6]].tolist() == [-100, -100, -100]
    assert packed["labels"][5] == documents[1]["labels"][1]
    assert packed["token_counts"] == {"raw": 11, "all": 22}
    assert documents[1]["labels"][0] == documents[1]["input_ids"][0]  # what was given is as it was


def test_concatenation_cuts_long_documents_and_trains_plain_text_on_itself():
    packed = concatenate([{"input_ids": torch.arange(10)}, {"input_ids": torch.arange(3)}], max_tokens=4)
    assert packed["input_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert packed["labels"].tolist() == [-100, 1, 2, 3, -100, 1, 2]


def test_batch_of_packed_documents_is_one_row_with_padding_only_at_its_end():
    batch = as_one_row([concatenate(make_documents([4, 2]))], length=9, pad_id=7)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["segment_ids"].shape == (1, 9)
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch["input_ids"][0, 6:].tolist() == [7] * 3 and batch["labels"][0, 6:].tolist() == [-100] * 3
    assert batch["token_counts"]["raw"].tolist() == [[6]]
    assert as_one_row([concatenate(make_documents([4, 2]))])["input_ids"].shape == (1, 6)


MODELS = {
    "full attention": {},
    "sliding window": dict(sliding_window_size=6, sliding_window_indices=[1, 0]),
    "grouped queries": dict(n_query_groups=2),
    "multi-query": dict(n_query_groups=1),
    "MLA": dict(
        latent_attention=dict(q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    ),
    "soft-capping": dict(attention_logit_softcapping=5.0),
    "window on every layer, grouped": dict(sliding_window_size=5, n_query_groups=2),
}


def build_model(fields):
    model = GPT(
        Config(
            name="tiny", n_layer=2, n_embd=32, n_head=4, block_size=256, vocab_size=300, padded_vocab_size=320,
            norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=48, bias=False,
            rotary_percentage=1.0, **fields
        )
    )  # fmt: skip
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # attention that is far from even
    return model


def shifted(example):
    return example["input_ids"][..., :-1], example["labels"][..., 1:]


@pytest.mark.parametrize("length", [None, 150])
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_packed_documents_have_the_loss_of_each_by_itself(fields, length):
    model = build_model(fields)
    documents = make_documents([17, 40, 2, 9, 33, 1, 25])
    batch = as_one_row([concatenate(documents)], length)
    idx, targets = shifted(batch)
    logits = model(idx, segment_ids=batch["segment_ids"][:, :-1])
    packed = F.cross_entropy(logits[0], targets[0], reduction="none")
    alone = []
    for document in documents:
        ids, labels = shifted({key: document[key][None] for key in ("input_ids", "labels")})
        if ids.size(1):
            alone.append(F.cross_entropy(model(ids)[0], labels[0], reduction="none"))
    packed, alone = packed[targets[0] != -100], torch.cat(alone)
    alone = alone[torch.cat([document["labels"][1:] for document in documents]) != -100]
    assert len(packed) == len(alone) and (packed - alone).abs().max() < 1e-5


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_packed_documents_give_loss_and_gradients_of_a_padded_batch(fields):
    model = build_model(fields)
    documents = make_documents([17, 40, 2, 9, 33])
    batch = as_one_row([concatenate(documents)])
    idx, targets = shifted(batch)
    packed, n = model(idx, targets=targets, segment_ids=batch["segment_ids"][:, :-1])
    gradients = torch.autograd.grad(packed / n, list(model.parameters()))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([document["input_ids"] for document in documents], batch_first=True)
    labels = pad([document["labels"] for document in documents], batch_first=True, padding_value=-100)
    padded, n_padded = model(ids[:, :-1].contiguous(), targets=labels[:, 1:].contiguous())
    assert n == n_padded and (packed / n - padded / n).abs() < 1e-5
    for one, other in zip(gradients, torch.autograd.grad(padded / n, list(model.parameters()))):
        assert (one - other).abs().max() <= 1e-5 * max(1.0, other.abs().max())


def test_documents_that_see_each_other_would_be_noticed():
    model = build_model({})
    batch = as_one_row([concatenate(make_documents([17, 40, 9]))])
    idx, targets = shifted(batch)
    right = model(idx, targets=targets, segment_ids=batch["segment_ids"][:, :-1])[0]
    assert (right - model(idx, targets=targets)[0]).abs() > 1e-2


def test_a_packed_batch_may_be_longer_than_the_model_s_longest_text():
    model = build_model({})
    model.max_seq_length = 40
    batch = as_one_row([concatenate(make_documents([40, 30, 25]))])
    assert model(batch["input_ids"], segment_ids=batch["segment_ids"]).shape == (1, 95, 320)
