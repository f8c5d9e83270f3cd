import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.data.sampler import MixedStream, Permutation, TokenLoader, WindowStream, taken


class CountingShards:
    """Stands for shards whose n-th token is n, so that what was read can be told."""

    folder = "somewhere"

    def __init__(self, n_tokens):
        self.n_tokens = n_tokens

    def __len__(self):
        return self.n_tokens

    def windows(self, starts, length):
        assert starts.min() >= 0 and starts.max() + length <= self.n_tokens
        return starts[:, None] + np.arange(length)


class NumberStream:
    """A stream of samples `(n,)` whose only token is the number of the sample."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def read(self, samples):
        return torch.from_numpy(samples.copy())[:, None]


def loaders(stream, world, batch_size=2, **kwargs):
    return [TokenLoader(stream, batch_size, rank=rank, world=world, **kwargs) for rank in range(world)]


def run(ranks, n_steps):
    """The next batches of all ranks, `n_steps` of them over as many epochs as it takes: a list of lists of tensors."""
    steps = []
    while len(steps) < n_steps:
        for batches in zip(*ranks, strict=True):
            steps.append(batches)
            if len(steps) == n_steps:
                break
    return steps


def numbers(steps):
    """First tokens in the order of the global samples, which go round the ranks."""
    return [batch[row, 0].item() for batches in steps for row in range(len(batches[0])) for batch in batches]


@given(n=st.integers(1, 600), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_permutation_visits_each_number_once(n, seed, epoch):
    assert sorted(Permutation(n, seed, epoch)(np.arange(n)).tolist()) == list(range(n))


def test_permutation_of_a_huge_range_answers_at_once():
    permutation = Permutation(10**12, 1, 2)
    values = permutation(np.array([0, 1, 10**12 - 1]))
    assert len(set(values.tolist())) == 3 and values.min() >= 0 and values.max() < 10**12


def test_permutation_sends_each_number_everywhere():
    counts = np.zeros((6, 6))
    for seed in range(1200):
        counts[np.arange(6), Permutation(6, seed)(np.arange(6))] += 1
    assert np.abs(counts - 200).max() < 65  # five standard deviations


def test_permutation_stays_the_same_in_later_versions():
    assert Permutation(12, 42, 0)(np.arange(12)).tolist() == [0, 1, 8, 2, 6, 3, 4, 7, 5, 11, 9, 10]


@pytest.mark.parametrize("n_tokens", [33, 40, 41, 47])
def test_each_token_is_predicted_exactly_once_per_epoch(n_tokens):
    stream = WindowStream(CountingShards(n_tokens), 8, seed=3)
    for epoch in range(4):
        rows = stream.read(np.arange(len(stream)) + epoch * len(stream))
        targets = sorted(rows[:, 1:].flatten().tolist())
        assert targets == list(range(targets[0], targets[0] + 8 * len(stream)))
        assert rows.dtype == torch.int64 and rows.shape == ((n_tokens - 1) // 8, 9)


def test_tokens_left_over_by_one_epoch_are_predicted_in_another():
    stream = WindowStream(CountingShards(46), 8, seed=3)
    seen = [set(stream.read(np.arange(5) + 5 * epoch)[:, 1:].flatten().tolist()) for epoch in range(6)]
    assert all(len(targets) == 40 for targets in seen)
    assert set.union(*seen) == set(range(1, 46))


def test_epochs_and_seeds_have_different_orders():
    stream = WindowStream(CountingShards(801), 8, seed=3)
    orders = [stream.starts(np.arange(100) + 100 * epoch).tolist() for epoch in range(3)]
    orders.append(WindowStream(CountingShards(801), 8, seed=4).starts(np.arange(100)).tolist())
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_too_few_tokens_are_refused_with_the_numbers_and_the_flag():
    with pytest.raises(ValueError, match=r"8 tokens.* 8 \+ 1.*--train.max_seq_length to 3"):
        WindowStream(CountingShards(8), 8)
    assert len(WindowStream(CountingShards(9), 8)) == 1


@pytest.mark.parametrize("world", [1, 2, 4])
@given(k=st.integers(0, 40))
@settings(max_examples=12, deadline=None)
def test_resumed_run_equals_the_straight_run(world, k):
    stream = WindowStream(CountingShards(8 * 19 + 3), 8, seed=5)
    straight = run(loaders(stream, world), 45)
    before = loaders(stream, world)
    run(before, k)
    after = loaders(stream, world)
    for old, new in zip(before, after):
        new.load_state_dict(old.state_dict())
    for expected, got in zip(straight[k:], run(after, 45 - k), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("worlds", [(2, 1, 4), (4, 2, 1), (1, 4, 2)])
def test_resume_on_other_numbers_of_ranks_loses_and_repeats_nothing(worlds):
    stream = WindowStream(CountingShards(8 * 100 + 1), 8, seed=5)
    seen, state = [], None
    for world, n_steps in zip(worlds, (7, 9, 60)):
        ranks = loaders(stream, world)
        if state:
            for loader in ranks:
                loader.load_state_dict(state)
        seen += numbers(run(ranks, n_steps))
        state = ranks[0].state_dict()
        assert state["samples"] == len(seen)
    for epoch in range(len(seen) // 100):
        assert sorted(seen[100 * epoch : 100 * (epoch + 1)]) == list(range(0, 800, 8)), epoch


def test_second_epoch_sees_all_samples_in_another_order():
    loader = TokenLoader(WindowStream(CountingShards(8 * 20 + 1), 8, seed=5), 5, rank=0, world=1)
    first, second = (numbers([[batch] for batch in loader]) for _ in range(2))
    assert sorted(first) == sorted(second) and first != second
    assert loader.epoch == 2


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 13])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_ranks_take_the_same_steps_and_no_sample_is_dropped(n, world):
    stream = NumberStream(n)
    ranks = loaders(stream, world)
    for _ in range(3):
        assert len({len(list(loader)) for loader in ranks}) == 1
    seen = numbers(run(loaders(stream, world), 3 * len(ranks[0]) + 1))
    assert seen == list(range(len(seen)))  # global samples are handed out in order, whoever gets them
    assert len(seen) >= 3 * n


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_neither_batches_nor_state(num_workers):
    stream = WindowStream(CountingShards(8 * 30 + 1), 8, seed=5)
    expected = run(loaders(stream, 1, batch_size=4), 6)
    loader = TokenLoader(stream, 4, rank=0, world=1, num_workers=num_workers)
    iterator = iter(loader)
    for number, (batch,) in enumerate(expected, 1):
        assert torch.equal(next(iterator), batch)
        assert loader.state_dict()["samples"] == 4 * number  # what workers have fetched ahead does not count


def test_set_epoch_jumps_only_where_it_is_not_already():
    loader = TokenLoader(NumberStream(10), 3, rank=0, world=1)
    list(loader)
    assert loader.state_dict()["samples"] == 12
    loader.set_epoch(1)
    assert loader.state_dict()["samples"] == 12
    loader.set_epoch(5)
    assert next(iter(loader))[:, 0].tolist() == [50, 51, 52]


def test_state_of_other_data_is_noticed():
    loader = TokenLoader(NumberStream(10), 3, rank=0, world=1)
    with pytest.warns(UserWarning, match="10 samples per epoch, 11"):
        loader.load_state_dict(TokenLoader(NumberStream(11), 3, rank=0, world=1).state_dict())
    with pytest.raises(ValueError, match="same --data"):
        loader.load_state_dict({"dataset": {}, "num_workers": 3})


@pytest.mark.parametrize("n", [1, 5, 8, 13])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_validation_reads_everything_in_order_with_equal_steps(n, world):
    ranks = loaders(NumberStream(n), world, batch_size=2, endless=False)
    for _ in range(2):
        steps = list(zip(*ranks, strict=True))
        seen = numbers(steps)
        assert seen[:n] == list(range(n)) and len(seen) < n + world
        assert {len(batch) for batches in steps[:-1] for batch in batches} <= {2}
        assert len(ranks[0]) == len(steps)


def test_validation_windows_follow_the_text():
    stream = WindowStream(CountingShards(50), 8)
    assert stream.starts(np.arange(6)).tolist() == [0, 8, 16, 24, 32, 40]


@pytest.mark.parametrize("weights", [(0.693584, 0.306416), (1, 1), (0.5, 0.2, 0.3), (1, 0)])
def test_mixture_keeps_its_shares_and_loses_no_sample(weights):
    streams = [NumberStream(10**6) for _ in weights]
    which, index = MixedStream(streams, weights).locate(np.arange(5000))
    for number, weight in enumerate(weights):
        mine = index[which == number]
        assert mine.tolist() == list(range(len(mine)))
        share = np.cumsum(which == number)
        exact = np.arange(1, 5001) * weight / sum(weights)
        assert np.abs(share - exact).max() < len(weights)


def test_mixture_reads_the_stream_that_it_names():
    big, small = WindowStream(CountingShards(801), 8, seed=1), WindowStream(CountingShards(401), 8, seed=1)
    small.shards = CountingShards(401)
    mixed = MixedStream([big, small], [0.75, 0.25])
    assert len(mixed) == min(100 * 4 // 3, 50 * 4)
    samples = np.array([7, 2, 9, 4])
    which, index = mixed.locate(samples)
    for row, stream, i in zip(mixed.read(samples), which, index):
        assert torch.equal(row, (big, small)[stream].read(np.array([i]))[0])


def test_mixture_does_not_overflow_after_very_many_samples():
    sample = 10**15
    assert taken(np.array([sample]), 693584, 10**6).tolist() == [sample * 693584 // 10**6]
