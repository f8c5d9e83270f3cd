import pickle

import numpy as np
import pytest
import torch

from litgpt.data import preference_dataset
from litgpt.data.preference_dataset import PreferenceEncoder, reference_table
from litgpt.prompts import Default


class Pairs:
    """Pairs that are told apart by their number."""

    def __init__(self, n):
        self.lengths = np.arange(n)[::-1].copy()

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return {"number": index}


def log_probs(examples):
    """Chosen rows, then rejected ones."""
    numbers = torch.tensor([example["number"] for example in examples], dtype=torch.float32)
    return torch.cat([-numbers, -100 - numbers])


@pytest.mark.parametrize("n, world, batch_size", [(1, 1, 4), (7, 1, 3), (8, 2, 2), (5, 4, 2)])
def test_reference_table_has_every_pair_whatever_the_number_of_ranks(n, world, batch_size, monkeypatch):
    parts, n_calls = [], []
    for rank in range(world):
        calls = []
        monkeypatch.setattr(preference_dataset, "rank_and_world", lambda rank=rank: (rank, world))
        parts.append(reference_table(Pairs(n), lambda e, calls=calls: calls.append(len(e)) or log_probs(e), batch_size))
        n_calls.append(calls)
    total = sum(parts)
    assert (total[:, 2] >= 1).all() and all(calls == n_calls[0] for calls in n_calls)
    expected = torch.stack([-torch.arange(n), -100 - torch.arange(n)], dim=1).double()
    assert torch.equal(total[:, :2] / total[:, 2:], expected)


def test_encoder_can_be_given_to_another_process(tokenizer):
    encoder = PreferenceEncoder(tokenizer, Default(), 64)
    sample = {"prompt": "a", "chosen": "b", "rejected": "c"}
    first, second = encoder(sample), pickle.loads(pickle.dumps(encoder))(sample)
    assert all(torch.equal(first[key], second[key]) for key in first if key != "faults")


def test_encoder_key_changes_with_what_decides_about_the_examples(tokenizer):
    keys = {
        str(PreferenceEncoder(tokenizer, Default(), length, too_long).key())
        for length in (32, 64)
        for too_long in ("cut", "drop")
    }
    assert len(keys) == 4
