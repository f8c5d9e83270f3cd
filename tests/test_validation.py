import pytest
import torch
from lightning.fabric import Fabric

from litgpt.config import Config
from litgpt.model import GPT
from litgpt.objective import NextToken
from litgpt.validation import evaluate, measure

TINY = dict(n_layer=1, n_embd=32, n_head=4, block_size=16, vocab_size=60, padding_multiple=64, dropout=0.5)


class Uneven(NextToken):
    """Trains on the first so many tokens of each row, and reports one more figure."""

    def collate(self, examples, split, rng):
        batch = super().collate(examples, split, rng)
        assert split == "eval"
        for row, labels in zip(examples, batch["labels"], strict=True):
            labels[int(row["input_ids"][0]) % 8 :] = -100
        batch["noise"] = torch.rand(1, generator=rng)
        return batch

    def metrics(self, batch, out):
        return {**super().metrics(batch, out), "noise": (batch["noise"].sum(), torch.tensor(1))}


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1, precision="32-true")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(Config(**TINY))
    model.init_weights()
    return model


@pytest.fixture
def batches():
    return torch.randint(60, (5, 2, 9), generator=torch.Generator().manual_seed(0))


def test_mean_is_over_targets_not_over_batches(fabric, model, batches):
    found = evaluate(fabric, model, batches, 3, Uneven(), seed=1)
    model.eval()
    total = count = 0
    for row in batches[:3].flatten(0, 1):
        n = int(row[0]) % 8
        if n:
            loss, _ = model(row[None, :n], targets=row[None, 1 : n + 1])
            total, count = total + loss.item(), count + n
    assert found["loss"] == pytest.approx(total / count, rel=1e-6)


def test_validation_is_repeatable_and_leaves_the_training_alone(fabric, model, batches):
    state = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(batches.flatten(0, 1), batch_size=2, shuffle=True)
    one = evaluate(fabric, model, loader, 5, Uneven(), seed=1)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(p.grad is None for p in model.parameters())
    assert evaluate(fabric, model, loader, 5, Uneven(), seed=1) == one
    assert evaluate(fabric, model, loader, 5, Uneven(), seed=2)["noise"] != one["noise"]


def test_nothing_to_validate_on_gives_no_figures(fabric, model):
    assert evaluate(fabric, model, [], 3, NextToken(), seed=1) == {}
    assert measure(fabric, model, [], 3, NextToken(), 1, None) == {}


def test_nats_per_byte_need_the_bytes_of_a_token(fabric, model, batches):
    class Data:
        def bytes_per_token(self, split):
            assert split == "val"
            return 2.5

    row = measure(fabric, model, batches, 5, NextToken(), 1, Data())
    assert row["val_nats_per_byte"] == row["val_loss"] / 2.5
    assert measure(fabric, model, batches, 5, NextToken(), 1, None)["val_nats_per_byte"] is None
