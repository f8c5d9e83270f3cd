import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Subset

from litgpt.data.batching import ExampleLoader, lengths_of

KINDS = {"plain": {}, "grouped": dict(group_by_length=True), "packed": dict(pack_into=64)}


class Numbered:
    """Examples of random lengths that consist of their own number."""

    def __init__(self, n, longest=40):
        self.lengths = np.random.default_rng(n).integers(2, longest, n)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return {"input_ids": torch.full((int(self.lengths[i]),), i)}


def loaders(examples, world, batch_size=2, **kwargs):
    return [ExampleLoader(examples, batch_size, list, seed=3, rank=r, world=world, **kwargs) for r in range(world)]


def numbers(batch):
    """Numbers of the examples in a batch."""
    if "segment_ids" in batch[0]:
        (packed,) = batch
        return [packed["input_ids"][packed["segment_ids"] == s][0].item() for s in packed["segment_ids"].unique()]
    return [example["input_ids"][0].item() for example in batch]


def run(ranks, n_steps):
    """Examples of the next `n_steps` steps, over as many epochs as it takes: for each step a list for each rank."""
    steps = []
    while len(steps) < n_steps:
        for batches in zip(*ranks, strict=True):
            steps.append([numbers(batch) for batch in batches])
            if len(steps) == n_steps:
                break
    return steps


def epoch_of(ranks):
    return [[numbers(batch) for batch in batches] for batches in zip(*ranks, strict=True)]


def flat(steps):
    return [number for batches in steps for batch in batches for number in batch]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 4])
@given(k=st.integers(0, 30))
@settings(max_examples=6, deadline=None)
def test_resumed_run_equals_the_straight_run(kind, world, k):
    examples = Numbered(53)
    straight = run(loaders(examples, world, **KINDS[kind]), 40)
    before = loaders(examples, world, **KINDS[kind])
    run(before, k)
    after = [
        ExampleLoader(examples, 2, list, seed=99, rank=rank, world=world, **KINDS[kind]) for rank in range(world)
    ]  # another seed in the resumed run must not change what comes next
    for old, new in zip(before, after):
        new.load_state_dict(old.state_dict())
    assert run(after, 40 - k) == straight[k:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("worlds", [(2, 1, 4), (4, 2, 1)])
def test_resume_on_other_numbers_of_ranks_loses_and_repeats_nothing(kind, worlds):
    examples = Numbered(101)
    steps, state = [], None
    for world, n_steps in zip(worlds, (7, 5, 200)):
        ranks = loaders(examples, world, **KINDS[kind])
        for loader in ranks if state else ():
            loader.load_state_dict(state)
        steps += run(ranks, n_steps)
        state = ranks[0].state_dict()
    n_epochs, more = divmod(state["samples"], state["samples_per_epoch"])
    counts = np.bincount(flat(steps), minlength=101)
    assert n_epochs >= 4 and counts.min() == n_epochs and counts.max() == n_epochs + bool(more)
    if kind != "packed":  # each epoch by itself; a packed batch does not tell its rows apart
        in_order = [number for batches in steps for row in zip(*batches) for number in row]
        for epoch in range(n_epochs):
            assert sorted(in_order[101 * epoch : 101 * (epoch + 1)]) == list(range(101)), epoch


@pytest.mark.parametrize("kind", KINDS)
def test_each_epoch_has_every_example_once_in_another_order(kind):
    (loader,) = loaders(Numbered(64), 1, batch_size=1, **KINDS[kind])
    first, second = flat(epoch_of([loader])), flat(epoch_of([loader]))
    assert sorted(first) == sorted(second) == list(range(64)) and first != second
    assert loader.epoch == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7, 13])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_ranks_take_the_same_steps_and_no_example_is_dropped(kind, n, world):
    ranks = loaders(Numbered(n), world, **KINDS[kind])
    n_steps = len(ranks[0])
    seen = [flat(epoch_of(ranks)) for _ in range(3)]
    (state,) = {str(loader.state_dict()): loader.state_dict() for loader in ranks}.values()
    assert set(seen[0]) == set(range(n)) and {len(loader) for loader in ranks} == {n_steps}
    counts = np.bincount([number for epoch in seen for number in epoch], minlength=n)
    n_epochs, more = divmod(state["samples"], state["samples_per_epoch"])
    assert n_epochs >= 3 and counts.min() == n_epochs and counts.max() == n_epochs + bool(more)


@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_neither_batches_nor_state(kind):
    examples = Numbered(30)
    (expected,) = loaders(examples, 1, batch_size=3, **KINDS[kind])
    (loader,) = loaders(examples, 1, batch_size=3, num_workers=2, **KINDS[kind])
    for step, (one, other) in enumerate(zip(expected, loader, strict=True), 1):
        assert numbers(one) == numbers(other)
        assert loader.state_dict()["samples"] == 3 * step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2])
def test_validation_is_the_same_each_time_and_whatever_the_seed(kind, world):
    def build(seed):
        return [
            ExampleLoader(Numbered(31), 4, list, seed, shuffle=False, rank=rank, world=world, **KINDS[kind])
            for rank in range(world)
        ]

    ranks = build(1)
    first = epoch_of(ranks)
    assert first == epoch_of(ranks) == epoch_of(build(2))
    assert set(flat(first)) == set(range(31))
    if world == 1:
        assert sorted(flat(first)) == list(range(31))
    if kind == "plain":
        assert flat(epoch_of(build(1)[:1]))[0] == 0


def padding(batches):
    padded = sum(len(batch) * max(len(e["input_ids"]) for e in batch) for batch in batches)
    return 1 - sum(len(e["input_ids"]) for batch in batches for e in batch) / padded


def test_grouped_batches_have_little_padding_in_every_epoch_and_come_in_random_order():
    examples = Numbered(1003, longest=300)  # no multiple of the batch size: epochs begin within a batch
    (plain,), (grouped,) = loaders(examples, 1, 8), loaders(examples, 1, 8, group_by_length=True)
    for epoch in range(3):
        batches = list(grouped)
        assert padding(batches) < 0.05 < 0.3 < padding(list(plain))
        means = [sum(len(e["input_ids"]) for e in batch) for batch in batches]
        neighbours = np.corrcoef(means[:-1], means[1:])[0, 1]
        assert abs(neighbours) < 0.3, (epoch, neighbours)


def test_ranks_of_one_step_get_examples_of_similar_length():
    ranks = loaders(Numbered(800, longest=300), 4, 4, group_by_length=True)
    spreads = []
    for batches in zip(*ranks):
        lengths = [len(example["input_ids"]) for batch in batches for example in batch]
        spreads.append(max(lengths) - min(lengths))
    assert np.median(spreads) < 30


def test_packed_batches_are_one_row_of_at_most_batch_size_rows():
    loader = ExampleLoader(Numbered(200), 4, pack_into=64, rank=0, world=1)
    batches = list(loader)
    assert all(batch["input_ids"].shape[0] == 1 and batch["input_ids"].shape[1] <= 4 * 64 for batch in batches)
    assert all(batch["input_ids"].shape == batch["labels"].shape == batch["segment_ids"].shape for batch in batches)
    assert np.mean([batch["input_ids"].shape[1] for batch in batches]) > 0.95 * 4 * 64


def test_collate_function_gets_the_examples():
    loader = ExampleLoader(Numbered(6), 3, lambda examples: len(examples), rank=0, world=1)
    assert list(loader) == [3, 3]
    packed = ExampleLoader(Numbered(6), 3, lambda examples: [set(e) for e in examples], pack_into=64, rank=0, world=1)
    assert next(iter(packed)) == [{"input_ids", "labels", "segment_ids"}]


def test_state_of_another_kind_or_of_other_data_is_noticed():
    (plain,), (packed,) = loaders(Numbered(50), 1), loaders(Numbered(50), 1, pack_into=64)
    with pytest.raises(ValueError, match=r"were plain, now .* packed.*--data.pack"):
        packed.load_state_dict(plain.state_dict())
    (more,) = loaders(Numbered(51), 1)
    with pytest.warns(UserWarning, match="51 samples per epoch, 50"):
        more.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="finetuning data; resume with the same --data"):
        plain.load_state_dict({"something": 1})


def test_no_example_is_refused():
    with pytest.raises(ValueError, match="no example"):
        ExampleLoader([], 2)


def test_lengths_are_known_of_subsets_and_of_plain_lists():
    examples = Numbered(10)
    assert lengths_of(Subset(examples, [3, 1])).tolist() == examples.lengths[[3, 1]].tolist()
    assert lengths_of([examples[i] for i in range(10)]).tolist() == examples.lengths.tolist()
