import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from litgpt.losses import chunked_cross_entropy
from litgpt.objective import NextToken, Objective, accepts


class Bigram(nn.Module):
    """Logits from the current token alone: a model that is no GPT."""

    def __init__(self, vocab_size: int = 11) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx):
        return self.table(idx)


class Fused(Bigram):
    """The same, with the interface of a GPT in training."""

    def forward(self, idx, *, targets=None):
        logits = self.table(idx)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), (targets != -100).sum()


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def test_next_token_collate_shifts_labels_by_one(rng):
    rows = torch.arange(10).view(2, 5)
    batch = NextToken().collate([{"input_ids": row} for row in rows], "train", rng)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch["labels"].tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]


def test_next_token_collate_pads_short_rows_without_training_on_the_padding(rng):
    examples = [{"input_ids": torch.tensor([1, 2, 3])}, {"input_ids": torch.tensor([4, 5])}]
    batch = NextToken().collate(examples, "train", rng)
    assert batch["input_ids"].tolist() == [[1, 2], [4, 5]]
    assert batch["labels"].tolist() == [[2, 3], [5, -100]]


def test_next_token_collate_uses_labels_that_an_example_brings(rng):
    example = {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, -100, 3])}
    assert NextToken().collate([example], "train", rng)["labels"].tolist() == [[-100, 3]]


@pytest.mark.parametrize("model_class", [Bigram, Fused])
def test_next_token_loss_is_the_summed_cross_entropy(model_class, rng):
    torch.manual_seed(1)
    model = model_class()
    idx = torch.randint(11, (3, 4))
    labels = torch.randint(11, (3, 4))
    labels[0, 2:] = -100
    out = NextToken().loss(model, {"input_ids": idx, "labels": labels})
    expected = -model(idx).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100].sum()
    torch.testing.assert_close(out["loss"], expected)
    assert out["n"] == 10
    out["loss"].backward()
    assert model.table.weight.grad.abs().sum() > 0


def test_targets_are_found_behind_wrappers():
    assert accepts(Wrapper(Wrapper(Fused())), "targets")
    assert not accepts(Wrapper(Bigram()), "targets")
    out = NextToken().loss(Wrapper(Bigram()), {"input_ids": torch.tensor([[1]]), "labels": torch.tensor([[2]])})
    assert out["n"] == 1


def test_next_token_metrics_leave_out_the_count():
    out = {"loss": torch.tensor(6.0), "n": torch.tensor(3), "part": torch.tensor(2.0)}
    metrics = NextToken().metrics({}, out)
    assert {name: (s.item(), n.item()) for name, (s, n) in metrics.items()} == {"loss": (6.0, 3), "part": (2.0, 3)}


def test_next_token_predict_is_greedy_keeps_the_prompt_and_stops_at_eos():
    model = Bigram(5)
    with torch.no_grad():  # 0 -> 1 -> 2 -> 3 -> 4 -> 0
        model.table.weight.copy_(torch.eye(5).roll(1, dims=1))
    prompt = torch.tensor([[0], [2]])
    out = NextToken().predict(model, prompt, max_new_tokens=3, eos_id=3)
    assert out["ids"].tolist() == [[0, 1, 2, 3], [2, 3, 4, 0]]
    assert out["lengths"].tolist() == [4, 2]
    assert out["steps"] == 3
    assert prompt.tolist() == [[0], [2]]


def test_next_token_predict_samples_within_top_k_and_repeats_with_its_generator():
    torch.manual_seed(0)
    model, prompt = Bigram(), torch.zeros(8, 1, dtype=torch.long)
    sampling = {"max_new_tokens": 4, "temperature": 1.0, "top_k": 2}
    draws = [NextToken().predict(model, prompt, rng=torch.Generator().manual_seed(s), **sampling) for s in (1, 1, 2)]
    assert torch.equal(draws[0]["ids"], draws[1]["ids"]) and not torch.equal(draws[0]["ids"], draws[2]["ids"])
    allowed = model(draws[0]["ids"][:, :-1]).topk(2).indices
    assert (allowed == draws[0]["ids"][:, 1:, None]).any(-1).all()


def test_next_token_predict_refuses_settings_it_does_not_know():
    with pytest.raises(TypeError, match="top_z"):
        NextToken().predict(Bigram(), torch.zeros(1, 1, dtype=torch.long), top_z=1)


def test_objective_without_its_own_steps_says_what_is_missing(rng):
    with pytest.raises(NotImplementedError, match="Objective does not say how to collate"):
        Objective().collate([], "train", rng)


@pytest.mark.parametrize("chunk_size", [0, 1, 3, 128])
@pytest.mark.parametrize("n_parts", [None, 1, 3])
def test_chunked_cross_entropy_equals_the_undivided_one(chunk_size, n_parts):
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 7, 13, requires_grad=True), torch.randint(13, (2, 7))
    targets[0, :3] = -100
    parts = logits if n_parts is None else list(logits.chunk(n_parts, dim=1))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = chunked_cross_entropy(parts, targets, chunk_size=chunk_size)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))


@pytest.mark.parametrize("as_list", [True, False])
def test_chunked_cross_entropy_of_nothing_is_zero(as_list):
    logits, targets = torch.randn(1, 4, 5), torch.full((1, 4), -100)
    assert chunked_cross_entropy([logits] if as_list else logits, targets) == 0
