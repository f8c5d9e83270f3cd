"""`GPT.forward(idx, targets=...)` against the loss of the full logits: same sum, same gradients, for every head."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from model_variants import TOLERANCE, VARIANTS, assert_close, build_model, random_tokens
from torch import Tensor, nn

import litgpt.model
from litgpt.model import GPT, CausalSelfAttention, explicit_attention, summed_cross_entropy

B, T, V = 2, 24, 100
ONE_CHUNK, MANY_CHUNKS = 2**27, 4 * V * 7  # of LOSS_CHUNK_BYTES: all tokens at once, seven at a time
BF16_TOLERANCE = 2e-2  # of the largest value: the 8 bits of bfloat16, a few layers deep

each_chunking = pytest.mark.parametrize("chunk_bytes", [ONE_CHUNK, MANY_CHUNKS], ids=["one chunk", "many chunks"])


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets, a run of which is ignored."""
    idx, targets = random_tokens(B, T), random_tokens(B, T)
    targets[0, :5] = -100
    targets[1, 9] = -100
    return idx, targets


def use_chunks(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setitem(litgpt.model.LOSS_CHUNK_BYTES, "cpu", chunk_bytes)


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies, without anything of ours."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum", ignore_index=-100)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model: GPT, idx: Tensor, targets: Tensor, tolerance: float = TOLERANCE) -> None:
    """The targets path gives the loss, the count and the gradients of the logits path."""
    expected = plain_loss(model(idx), targets)
    expected_grads = gradients(model, expected)
    total, n = model(idx, targets=targets)
    assert total.dtype == torch.float32 and total.shape == () and n == (targets != -100).sum()
    assert_close(total.detach(), expected.detach(), tolerance)
    grads = gradients(model, total)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@each_chunking
def test_targets_give_the_loss_and_gradients_of_the_logits(variant, chunk_bytes, batch, monkeypatch):
    use_chunks(monkeypatch, chunk_bytes)
    assert_same_training(build_model(variant), *batch)


@each_chunking
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", ["nothing", "head", "body"])
def test_heads_of_every_kind_agree(chunk_bytes, softcap, bias, frozen, batch, monkeypatch):
    use_chunks(monkeypatch, chunk_bytes)
    model = build_model("gqa", final_logit_softcapping=softcap, lm_head_bias=bias)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)  # so that soft-capping bites
        if bias:
            model.lm_head.bias.normal_()
    if frozen != "nothing":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("lm_head") != (frozen == "head"))
    assert_same_training(model, *batch)


@each_chunking
def test_a_frozen_model_has_a_loss_and_no_gradient(chunk_bytes, batch, monkeypatch):
    use_chunks(monkeypatch, chunk_bytes)
    model, (idx, targets) = build_model(), batch
    expected = plain_loss(model(idx), targets).detach()
    with torch.no_grad():
        total, _ = model(idx, targets=targets)
    assert not total.requires_grad
    assert_close(total, expected)
    total, _ = model.requires_grad_(False)(idx, targets=targets)
    assert not total.requires_grad


@each_chunking
@pytest.mark.parametrize("variant", ["gqa", "gemma2"])
def test_no_target_at_all_gives_zero_and_zero_gradients(chunk_bytes, variant, batch, monkeypatch):
    use_chunks(monkeypatch, chunk_bytes)
    model, (idx, _) = build_model(variant), batch
    total, n = model(idx, targets=torch.full_like(idx, -100))
    assert total == 0 and n == 0
    grads = gradients(model, total)
    assert grads and all((grad == 0).all() for grad in grads.values())
    assert model.loss(model(idx), torch.full_like(idx, -100)) == 0


def test_gradients_scale_with_what_is_done_to_the_loss(batch):
    model, (idx, targets) = build_model(), batch
    once = gradients(model, model(idx, targets=targets)[0])
    model.zero_grad(set_to_none=True)
    for _ in range(2):  # two micro batches of the same tokens
        total, n = model(idx, targets=targets)
        (total / n).backward()
    assert_close(model.lm_head.weight.grad, once["lm_head.weight"] * 2 / n)


def test_second_backward_is_refused(batch):
    model, (idx, targets) = build_model(), batch
    total, _ = model(idx, targets=targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once only"):
        total.backward()


@each_chunking
@pytest.mark.parametrize("variant", ["gqa", "gemma2", "mla", "neox"])
def test_autocast_agrees_with_the_logits_under_autocast(chunk_bytes, variant, batch, monkeypatch):
    use_chunks(monkeypatch, chunk_bytes)
    model = build_model(variant, lm_head_bias=True)
    true_grads = gradients(model, model(batch[0], targets=batch[1])[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain_grads = gradients(model, plain_loss(model(batch[0]), batch[1]))
        total, _ = model(batch[0], targets=batch[1])
        logits = model(batch[0])
    # two ways to round lie apart by more than either is off, so each is compared with float32
    grads = gradients(model, total)
    errors, plain_errors = (
        {name: (g[name] - true).norm() / true.norm() for name, true in true_grads.items()} for g in (grads, plain_grads)
    )
    assert sum(errors.values()) <= 1.1 * sum(plain_errors.values())
    assert logits.dtype == torch.bfloat16
    # the loss of the same rounded logits; soft-capping is done in float32 here, which is not
    exact = TOLERANCE if model.config.final_logit_softcapping is None else BF16_TOLERANCE
    assert_close(total.detach(), plain_loss(logits, batch[1]).detach(), exact)
    assert_close(total.detach(), model(batch[0], targets=batch[1])[0].detach(), BF16_TOLERANCE)


def test_bfloat16_weights_get_bfloat16_gradients_and_a_float32_loss(batch):
    model = build_model("gqa", lm_head_bias=True).to(torch.bfloat16)
    assert_same_training(model, *batch, tolerance=BF16_TOLERANCE)
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())


# ---- models that do it their own way


class OwnUnembed(GPT):
    def unembed(self, x, ctx):
        return 0.5 * super().unembed(x, ctx)


class OwnLoss(GPT):
    def loss(self, logits, targets):
        return super().loss(logits, targets) + 1e-2 * logits.logsumexp(dim=-1).square().mean()


class OwnEmbed(GPT):
    def embed(self, idx, ctx):
        return super().embed(idx, ctx) + 0.1 * ctx.positions.unsqueeze(-1)


class OwnDecode(GPT):
    def decode(self, x, ctx):
        return super().decode(x, ctx) + x


def of_class(cls: type[GPT]) -> GPT:
    plain = build_model("gqa")
    model = cls(plain.config)
    model.load_state_dict(plain.state_dict())
    return model.eval()


@pytest.mark.parametrize("cls", [OwnUnembed, OwnLoss, OwnEmbed, OwnDecode])
def test_overridden_steps_are_honoured(cls, batch):
    model, (idx, targets) = of_class(cls), batch
    expected = model.loss(model(idx), targets)
    expected_grads = gradients(model, expected)
    total, n = model(idx, targets=targets)
    assert_close((total / n).detach(), expected.detach())
    for name, grad in gradients(model, total / n).items():
        assert_close(grad, expected_grads[name])
    plain, n = of_class(GPT)(idx, targets=targets)
    assert (total / n - plain / n).abs() > 1e-3


class WrappedHead(nn.Module):
    """A linear layer with a low-rank path beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(4, linear.in_features))
        self.up = nn.Parameter(torch.randn(linear.out_features, 4) / 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)


@each_chunking
@pytest.mark.parametrize("variant", ["gqa", "gemma2"])
def test_a_wrapped_head_agrees(chunk_bytes, variant, batch, monkeypatch):
    use_chunks(monkeypatch, chunk_bytes)
    model = build_model(variant)
    model.lm_head = WrappedHead(model.lm_head)
    assert_same_training(model, *batch)


def test_a_subclass_of_linear_as_head_is_called(batch):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = build_model()
    model.lm_head.__class__ = Doubled
    assert_same_training(model, *batch)


def test_loss_is_the_mean_of_the_targets_in_float32(batch):
    model, (idx, targets) = build_model(), batch
    logits = model(idx)
    expected = plain_loss(logits, targets) / (targets != -100).sum()
    assert_close(model.loss(logits, targets).detach(), expected.detach())
    low = model.loss(logits.bfloat16(), targets)
    assert low.dtype == torch.float32
    assert_close(low.detach(), (plain_loss(logits.bfloat16(), targets) / (targets != -100).sum()).detach())


def test_training_never_holds_all_logits(monkeypatch):
    """Nothing as large as tokens x vocabulary is kept or made when they come in chunks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    model = build_model(vocab_size=5000, padded_vocab_size=5000, n_embd=4, n_head=1, intermediate_size=4)
    idx = random_tokens(4, 64)
    use_chunks(monkeypatch, 4 * 5000 * 16)
    with Largest() as largest:
        model(idx, targets=idx)[0].backward()
    assert 16 * 5000 <= largest.numel < 256 * 5000 // 4


# ---- torch.compile and kernels


@each_chunking
def test_the_path_for_compilers_agrees(chunk_bytes, batch, monkeypatch):
    use_chunks(monkeypatch, chunk_bytes)
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        assert_same_training(build_model("gemma2", lm_head_bias=True), *batch)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_equals_eager(backend, batch, monkeypatch):
    use_chunks(monkeypatch, MANY_CHUNKS)
    torch.compiler.reset()
    model, (idx, targets) = build_model("gqa", n_layer=1), batch
    eager, _ = model(idx, targets=targets)
    eager_grads = gradients(model, eager)
    compiled, _ = torch.compile(model, backend=backend)(idx, targets=targets)
    assert_close(compiled.detach(), eager.detach())
    for name, grad in gradients(model, compiled).items():
        assert_close(grad, eager_grads[name])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_few_low_precision_tokens_agrees_with_the_fused_kernel(groups, masked):
    """On CPU training in low precision spells attention out."""
    model = build_model(n_query_groups=groups)
    attention = model.transformer.h[0].attn
    q, k, v = (torch.randn(B, heads, 40, 8, dtype=torch.bfloat16) for heads in (4, groups, groups))
    mask = (torch.rand(40, 40) > 0.3) | torch.eye(40, dtype=torch.bool) if masked else None
    fused = attention.scaled_dot_product_attention(q, k, v, mask)
    with mock.patch("litgpt.model.explicit_attention", wraps=explicit_attention) as explicit:
        spelt_out = attention.scaled_dot_product_attention(q.requires_grad_(), k, v, mask)
    assert explicit.called and spelt_out.dtype == torch.bfloat16
    assert_close(spelt_out.detach(), fused, BF16_TOLERANCE)
    exact = CausalSelfAttention.scaled_dot_product_attention(
        attention, q.detach().float(), k.float(), v.float(), mask, is_causal=not masked
    )
    assert_close(spelt_out.detach(), exact, BF16_TOLERANCE)


def test_soft_capped_attention_is_its_formula():
    q, k, v = torch.randn(B, 4, 6, 8), torch.randn(B, 2, 9, 8), torch.randn(B, 2, 9, 8)
    mask = torch.rand(6, 9) > 0.4
    mask[:, 0] = True
    scores = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(2, dim=1)) * 0.3
    scores = (3 * torch.tanh(scores / 3)).masked_fill(~mask, -1e9)
    expected = torch.einsum("bhts,bhsd->bhtd", scores.softmax(dim=-1), v.repeat_interleave(2, dim=1))
    assert_close(explicit_attention(q, k, v, mask, scale=0.3, softcap=3.0, dropout=0.0), expected)


def test_summed_cross_entropy_is_its_formula():
    logits, targets = torch.randn(2, 3, 7), torch.tensor([[1, -100, 6], [0, 3, -100]])
    log_p = logits.log_softmax(dim=-1)
    expected = -(log_p[0, 0, 1] + log_p[0, 2, 6] + log_p[1, 0, 0] + log_p[1, 1, 3])
    assert_close(summed_cross_entropy(logits, targets), expected)


def test_dropout_changes_training_and_nothing_else(batch):
    idx, _ = batch
    for variant in ("gqa", "gemma2", "mla"):
        model = build_model(variant, dropout=0.5)
        model.set_kv_cache(B)
        assert torch.equal(model(idx), model(idx))
        assert_close(model(idx, torch.arange(T)), model(idx))
        model.train()
        assert (model(idx) - model(idx)).abs().max() > 1e-2


@pytest.mark.parametrize("part", ["embedding", "attention weights", "attention", "mlp"])
@pytest.mark.parametrize("parallel", [False, True])
def test_dropout_reaches_every_part(part, parallel):
    model = build_model("mha", dropout=0.5, n_layer=1, parallel_residual=parallel).train()
    block, x = model.transformer.h[0], torch.randn(1, 8, 32)
    if part in ("attention", "mlp"):  # the other one is silent, so that only the dropout after this one is left
        block.attn.forward = lambda x, *args: torch.full_like(x, float(part == "attention"))
        block.mlp.forward = lambda x: torch.full_like(x, float(part == "mlp"))
    steps = {"embedding": lambda: model.embed(torch.arange(8)[None], None), "attention weights": lambda: block.attn(x)}
    step = steps.get(part, lambda: block(x))
    assert not torch.equal(step(), step())
    model.eval()
    assert torch.equal(step(), step())
