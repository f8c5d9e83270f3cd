"""Any way of feeding a text gives the logits of feeding it whole: caches, rings, padding, packing, positions."""

from unittest import mock

import pytest
import torch
from model_variants import LATENT, SIZES, TOLERANCE, VARIANTS, assert_close, build_model, random_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt.config import Config
from litgpt.model import GPT, KVCache

B, T = 2, 24
WINDOW = 5  # of the variants with one

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def feed(model: GPT, idx: Tensor, plan: tuple[int, ...], batched: bool = False) -> Tensor:
    """Logits of `idx` fed with a fresh KV cache in chunks of `plan` tokens."""
    model.set_kv_cache(len(idx))
    chunks, start = [], 0
    for n in plan:
        pos = torch.arange(start, start + n)
        chunks.append(model(idx[:, start : start + n], pos.expand(len(idx), -1) if batched else pos))
        start += n
    return torch.cat(chunks, dim=1)


# ---- one text in pieces


@every_variant
@pytest.mark.parametrize("say_end", [True, False], ids=["with input_pos_maxp1", "without"])
def test_step_by_step_equals_the_whole_text(variant, say_end):
    model, idx = build_model(variant), random_tokens(B, T)
    model.set_kv_cache(B)
    steps = [model(idx[:, i : i + 1], torch.tensor([i]), i + 1 if say_end else None) for i in range(T)]
    assert_close(torch.cat(steps, dim=1), model(idx))


@every_variant
@pytest.mark.parametrize("batched", [False, True], ids=["(T,) positions", "(B, T) positions"])
@pytest.mark.parametrize("plan", [(3, 1, 7, 2, 9, 1, 1), (13, 1, 1, 9), (4, 4, 4, 4, 4, 4), (24,)], ids=str)
def test_uneven_chunks_equal_the_whole_text(variant, batched, plan):
    model, idx = build_model(variant), random_tokens(B, T)
    assert_close(feed(model, idx, plan, batched), model(idx))


@every_variant
def test_static_decode_steps_equal_the_whole_text(variant):
    """As under torch.compile: nobody knows where the cache ends, so that all shapes stay."""
    model, idx = build_model(variant), random_tokens(B, T)
    model.set_kv_cache(B)
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        parts = [model(idx[:, :6], torch.arange(6), 6)]
        parts += [model(idx[:, i : i + 1], torch.tensor([i])) for i in range(6, T)]
    assert_close(torch.cat(parts, dim=1), model(idx))


@every_variant
def test_chunks_of_rows_at_different_places_equal_their_own_texts(variant):
    model, idx, lengths = build_model(variant), random_tokens(B, T), torch.tensor([9, 14])
    full = model(idx)
    model.set_kv_cache(B)
    model(idx[:, :14], torch.arange(14), 14, mask=torch.arange(14) < lengths[:, None])
    for n in (4, 1, 5):
        pos = lengths[:, None] + torch.arange(n)
        logits = model(idx.gather(1, pos), pos)
        assert_close(logits, full.gather(1, pos[..., None].expand(-1, -1, full.size(-1))))
        lengths = lengths + n


@every_variant
def test_unequal_rows_padded_on_the_right_equal_their_own_texts(variant):
    model, idx, lengths = build_model(variant), random_tokens(3, T), torch.tensor([5, 14, 1])
    rows, full = torch.arange(3), model(idx)
    model.set_kv_cache(3)
    real = torch.arange(14) < lengths[:, None]
    prompt = idx[:, :14].masked_fill(~real, 7)
    logits = model(prompt, torch.arange(14), 14, mask=real, logits_to_keep=lengths - 1)
    assert_close(logits[:, 0], full[rows, lengths - 1])
    for step in range(10):
        pos = lengths + step
        logits = model(idx.gather(1, pos[:, None]), pos[:, None])
        assert_close(logits[:, 0], full[rows, pos])


@every_variant
def test_unequal_rows_in_chunks_equal_their_own_texts(variant):
    """The second chunk of a batched prefill holds nothing but padding in some rows."""
    model, idx, lengths = build_model(variant), random_tokens(3, T), torch.tensor([4, 15, 9])
    rows, full = torch.arange(3), model(idx)
    model.set_kv_cache(3)
    for chunk in (torch.arange(8), torch.arange(8, 16)):
        real = chunk < lengths[:, None]
        model(idx[:, chunk].masked_fill(~real, 7), chunk, mask=real)
    for step in range(8):
        pos = lengths + step
        logits = model(idx.gather(1, pos[:, None]), pos[:, None])
        assert_close(logits[:, 0], full[rows, pos])


def test_decode_compiles_once():
    model, idx = build_model("gemma3"), random_tokens(1, T)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    step = torch.compile(model, backend=backend, fullgraph=True)
    model.set_kv_cache(1)
    parts = [model(idx[:, :6], torch.arange(6), 6)]
    parts += [step(idx[:, i : i + 1], torch.tensor([i])) for i in range(6, T)]
    assert_close(torch.cat(parts, dim=1), model(idx))
    assert len(graphs) == 1


def test_a_cache_serves_smaller_batches_and_starts_afresh():
    model, idx = build_model("window"), random_tokens(2, T)
    model.set_kv_cache(3)
    model(random_tokens(3, T), torch.arange(T))
    logits = torch.cat((model(idx[:1, :9], torch.arange(9)), model(idx[:1, 9:], torch.arange(9, T))), dim=1)
    assert_close(logits, model(idx[:1]))


def test_a_cache_takes_the_dtype_of_the_activations():
    model, idx = build_model("gqa"), random_tokens(1, 8)
    model.set_kv_cache(1, dtype=torch.bfloat16)
    model(idx, torch.arange(8))
    assert model.transformer.h[0].attn.kv_cache.k.dtype == torch.float32
    assert_close(model(idx[:, 7:], torch.tensor([7])), model(idx)[:, 7:])


# ---- what a cache holds


@pytest.mark.parametrize(
    ("variant", "layer", "k_shape", "v_shape"),
    [
        ("mha", 0, (3, 4, 40, 8), (3, 4, 40, 8)),
        ("gqa", 0, (3, 2, 40, 8), (3, 2, 40, 8)),
        ("window", 0, (3, 2, WINDOW, 8), (3, 2, WINDOW, 8)),
        ("gemma3", 2, (3, 4, 40, 8), (3, 4, 40, 8)),
        ("mla", 0, (3, 1, 40, LATENT["kv_lora_rank"]), (3, 1, 40, LATENT["qk_rope_head_dim"])),
    ],
)
def test_cache_is_no_larger_than_needed(variant, layer, k_shape, v_shape):
    model = build_model(variant)
    model.set_kv_cache(3, max_seq_length=40)
    cache = model.transformer.h[layer].attn.kv_cache
    assert (cache.k.shape, cache.v.shape) == (k_shape, v_shape)
    assert not cache.k.any() and not cache.v.any()
    assert not [name for name in model.state_dict() if "cache" in name]
    model.clear_kv_cache()
    assert all(block.attn.kv_cache is None for block in model.transformer.h)


def test_a_window_as_long_as_the_cache_needs_no_ring():
    model, idx = build_model("window", sliding_window_size=16), random_tokens(1, 16)
    model.set_kv_cache(1, max_seq_length=16)
    assert not model.transformer.h[0].attn.kv_cache.is_ring
    parts = [model(idx[:, i : i + 4], torch.arange(i, i + 4)) for i in range(0, 16, 4)]
    assert_close(torch.cat(parts, dim=1), model(idx))


@pytest.mark.parametrize("batched", [False, True])
def test_ring_holds_the_last_tokens_in_their_slots(batched):
    ring = KVCache((1, 1, 64, 1), (1, 1, 64, 2), is_sliding_window=True, sliding_window_size=4)
    tokens = torch.arange(100.0).view(1, 1, -1, 1)
    start = 0
    for n in (3, 1, 6, 2, 1):
        pos = torch.arange(start, start + n)
        pos = pos[None] if batched else pos
        k, v = ring(pos, tokens[:, :, start : start + n], tokens[:, :, start : start + n].expand(-1, -1, -1, 2))
        start += n
        kept = ring.positions(pos[..., -1:]).flatten()
        assert kept.clamp(min=-1).sort()[0].tolist() == ([-1, 0, 1, 2] if start == 3 else [*range(start - 4, start)])
        assert all(k[0, 0, p % 4, 0] == v[0, 0, p % 4, 1] == p for p in kept.tolist() if p >= 0)


# ---- padding, packing, positions


@every_variant
def test_padding_on_the_left_changes_nothing(variant):
    model, idx = build_model(variant), random_tokens(B, T)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :4] = False
    logits = model(idx, mask=mask)
    assert logits.isfinite().all()
    assert_close(logits[:1, 4:], model(idx[:1, 4:]))
    assert_close(logits[1:], model(idx[1:]))


def test_a_row_of_nothing_but_padding_stays_finite():
    for variant in ("gqa", "gemma2", "mla"):
        assert build_model(variant)(random_tokens(B, T), mask=torch.zeros(B, T, dtype=torch.bool)).isfinite().all()


@every_variant
def test_packed_documents_equal_separate_ones(variant):
    model, idx = build_model(variant), random_tokens(B, T)
    cuts = ((0, 10, 24), (0, 3, 24))
    segment_ids = torch.tensor([[0] * 10 + [1] * 14, [5] * 3 + [2] * 21])
    logits = model(idx, segment_ids=segment_ids)
    for row, (a, b, c) in enumerate(cuts):
        alone = torch.cat((model(idx[row : row + 1, a:b]), model(idx[row : row + 1, b:c])), dim=1)
        assert_close(logits[row : row + 1], alone)


def test_texts_start_at_position_zero_wherever_they_stand():
    """RoPE would not notice a shift; positions learnt by heart would."""
    model, idx = build_model(), random_tokens(2, 6)
    mask = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    assert model.build_context(idx, mask=mask).positions.tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    segment_ids = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 4, 4, 4, 4, 4]])
    packed = model.build_context(idx, segment_ids=segment_ids)
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert model.build_context(idx).positions.tolist() == [0, 1, 2, 3, 4, 5]


@every_variant
@pytest.mark.parametrize("shape", ["(T,)", "(B, T)"])
def test_positions_may_be_given_as_float(variant, shape):
    model, idx = build_model(variant), random_tokens(B, T)
    positions = torch.arange(T).float() + 0.5  # RoPE knows distances only
    logits = model(idx, positions=positions if shape == "(T,)" else positions.expand(B, -1))
    assert_close(logits, model(idx))


def test_positions_of_half_the_distance_are_linear_scaling():
    model, idx = build_model("gqa"), random_tokens(B, T)
    scaled = GPT(Config(**SIZES | VARIANTS["gqa"] | dict(rope_adjustments=dict(factor=2.0)))).eval()
    scaled.load_state_dict(model.state_dict())
    halved = model(idx, positions=torch.arange(T) / 2)
    assert_close(halved, scaled(idx))
    assert (halved - model(idx)).abs().max() > 1e-2


def influence(model: GPT, token: int, length: int) -> Tensor:
    """How much another token at one place changes the logits of each place, `(T,)`, relative to the largest logit."""
    idx = random_tokens(1, length)
    changed = idx.clone()
    changed[0, token] = (changed[0, token] + 1) % SIZES["vocab_size"]
    logits = model(idx)
    return (logits - model(changed)).abs().amax(dim=-1)[0] / logits.abs().max()


@every_variant
def test_tokens_see_those_before_them_only(variant):
    seen = influence(build_model(variant), 12, T)
    assert (seen[:12] < TOLERANCE).all()  # experts run on as many rows as they get: the last bit may differ
    assert (seen[12 : 12 + WINDOW] > 10 * TOLERANCE).all()


@pytest.mark.parametrize("causal", [True, False])
def test_windows_reach_no_further_than_they_say(causal):
    seen = influence(build_model("window", causal=causal), 20, 40)
    reach = SIZES["n_layer"] * (WINDOW - 1)
    assert not seen[20 + reach + 1 :].any() and seen[20 : 20 + reach + 1].all()
    before = seen[20 - reach : 20]
    assert not seen[: 20 - reach].any() and (not before.any() if causal else before.all())


@pytest.mark.parametrize("variant", ["mha", "gqa", "gemma2", "mla"])
def test_an_encoder_sees_both_sides_but_no_padding(variant):
    model, idx = build_model(variant, causal=False), random_tokens(1, T)
    assert (influence(model, 12, T)[12 - WINDOW : 12 + WINDOW] > 10 * TOLERANCE).all()
    mask = torch.ones(1, T, dtype=torch.bool)
    mask[0, 20:] = False
    assert_close(model(idx, mask=mask)[:, :20], model(idx[:, :20]))


# ---- no tensor of T x T


class LargestTensor(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


LONG_SIZES = dict(n_layer=1, n_embd=8, n_head=1, intermediate_size=8, vocab_size=16, padded_vocab_size=16)


@pytest.mark.parametrize("fields", [dict(sliding_window_size=512), {}, dict(sliding_window_size=512, causal=False)])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("way", ["whole", "chunks", "padded", "packed"])
def test_no_tensor_grows_with_the_square_of_the_text(fields, softcap, way):
    length = 4096
    model = build_model("mha", **LONG_SIZES, block_size=length, attention_logit_softcapping=softcap, **fields)
    idx = torch.randint(0, 16, (1, length))
    if way == "chunks":
        model.set_kv_cache(1)
    with LargestTensor() as largest:
        if way == "chunks":
            for start in range(0, length, 1024):
                model(idx[:, start : start + 1024], torch.arange(start, start + 1024), logits_to_keep=1)
        elif way == "padded":
            model(idx, mask=torch.arange(length)[None] > 100)
        elif way == "packed":
            model(idx, segment_ids=torch.arange(length)[None] // 700)
        else:
            model(idx)
    assert length * 16 <= largest.numel <= length * length // 4


@pytest.mark.parametrize("cached", [False, True])
def test_no_tensor_of_latent_attention_grows_with_the_square_of_the_text(cached):
    length = 4096
    fields = dict(latent_attention=dict(LATENT, qk_rope_head_dim=4, v_head_dim=6), block_size=length)
    model, idx = build_model("mha", **LONG_SIZES, **fields), torch.randint(0, 16, (1, length))
    if cached:
        model.set_kv_cache(1)
    with LargestTensor() as largest:
        model(idx, *((torch.arange(length), length) if cached else ()), logits_to_keep=1)
    assert largest.numel <= length * length // 4
