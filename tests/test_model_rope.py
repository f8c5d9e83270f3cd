"""Rotary positions against formulas written out in numpy, and the small functions that `model.py` publishes."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from model_variants import assert_close, build_model, random_tokens

from litgpt.model import (
    apply_rope,
    apply_rope_interleave,
    batched_index_copy_,
    batched_index_select,
    build_mask_cache,
    build_rope_cache,
    do_softcapping,
    yarn_get_mscale,
)

N, LENGTH = 16, 48  # rotated elements, positions


def plain(base: float = 10000.0) -> np.ndarray:
    return np.array([base ** (-2 * i / N) for i in range(N // 2)])


def linear(factor: float) -> np.ndarray:
    return plain() / factor


def llama_3(factor: float, low: float, high: float, original: int, base: float) -> np.ndarray:
    """Long waves are stretched, short ones kept, those between blended (by the ratio of context to wavelength)."""
    out = []
    for freq in plain(base):
        wavelength = 2 * math.pi / freq
        if wavelength < original / high:
            out.append(freq)
        elif wavelength > original / low:
            out.append(freq / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append((1 - smooth) * freq / factor + smooth * freq)
    return np.array(out)


def yarn(factor: float, fast: float, slow: float, original: int, base: float, truncate: bool = True) -> np.ndarray:
    """Dimensions that turn more than `fast` times in the original context are kept, below `slow` stretched."""

    def dimension(turns: float) -> float:
        return N * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, N - 1)
    out = []
    for i, freq in enumerate(plain(base)):
        stretched = min(max((i - low) / (high - low), 0.0), 1.0)
        out.append(freq / factor * stretched + freq * (1 - stretched))
    return np.array(out)


def mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1


YARN: dict[str, Any] = dict(factor=8.0, beta_fast=4.0, beta_slow=1.0, original_max_seq_len=256)
YARN_ARGS = (8.0, 4.0, 1.0, 256, 100.0)
SHORT, LONG = [1.0 + 0.1 * i for i in range(N // 2)], [1.0 + 0.7 * i for i in range(N // 2)]
LONGROPE: dict[str, Any] = dict(short_factor=SHORT, long_factor=LONG, factor=4.0)
LONG_SCALE = math.sqrt(1 + math.log(4) / math.log(32))

# arguments of build_rope_cache, frequencies, factor on cosines and sines
METHODS: dict[str, tuple[dict[str, Any], np.ndarray, float]] = {
    "plain": ({}, plain(), 1.0),
    "another base": (dict(base=500), plain(500), 1.0),
    "condensed": (dict(condense_ratio=4), plain() / 4, 1.0),
    "linear": (dict(extra_config=dict(factor=8.0)), linear(8.0), 1.0),
    "llama 3": (
        dict(
            base=100, extra_config=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64)
        ),
        llama_3(8.0, 1.0, 4.0, 64, 100),
        1.0,
    ),
    "yarn": (dict(base=100, extra_config=YARN), yarn(*YARN_ARGS), mscale(8)),
    "yarn, ramp beyond the last pair": (
        dict(base=100, extra_config=YARN | dict(beta_fast=64.0, original_max_seq_len=4096)),
        yarn(8.0, 64.0, 1.0, 4096, 100.0),
        mscale(8),
    ),
    "yarn, not truncated": (
        dict(base=100, extra_config=YARN | dict(truncate=False)),
        yarn(*YARN_ARGS, truncate=False),
        mscale(8),
    ),
    "yarn, both mscales": (
        dict(base=100, extra_config=YARN | dict(mscale=0.7, mscale_all_dim=1.4)),
        yarn(*YARN_ARGS),
        mscale(8, 0.7) / mscale(8, 1.4),
    ),
    "yarn, one mscale": (dict(base=100, extra_config=YARN | dict(mscale=0.7)), yarn(*YARN_ARGS), mscale(8)),
    "yarn, attention factor": (dict(base=100, extra_config=YARN | dict(attention_factor=1.3)), yarn(*YARN_ARGS), 1.3),
    "longrope, short text": (
        dict(extra_config=LONGROPE | dict(original_max_seq_len=LENGTH)),
        plain() / np.array(SHORT),
        math.sqrt(1 + math.log(4) / math.log(LENGTH)),
    ),
    "longrope, long text": (
        dict(extra_config=LONGROPE | dict(original_max_seq_len=32)),
        plain() / np.array(LONG),
        LONG_SCALE,
    ),
    "longrope, attention factor": (
        dict(extra_config=LONGROPE | dict(original_max_seq_len=32, attention_factor=1.1)),
        plain() / np.array(LONG),
        1.1,
    ),
    "longrope, not longer": (
        dict(extra_config=LONGROPE | dict(original_max_seq_len=32, factor=1.0)),
        plain() / np.array(LONG),
        1.0,
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_rope_cache_is_its_formula(method):
    arguments, freqs, factor = METHODS[method]
    cos, sin = build_rope_cache(LENGTH, N, **arguments)
    angles = np.tile(np.arange(LENGTH)[:, None] * freqs, 2)
    assert cos.dtype == sin.dtype == torch.float32
    assert_close(cos, torch.from_numpy(np.cos(angles) * factor).float())
    assert_close(sin, torch.from_numpy(np.sin(angles) * factor).float())


def test_methods_differ_from_plain_rope_where_it_matters():
    """Each formula above touches some pairs and, but for the linear ones, not all of them alike."""
    for method in ("llama 3", "yarn", "yarn, not truncated", "longrope, short text", "longrope, long text"):
        arguments, freqs, _ = METHODS[method]
        ratios = plain(arguments.get("base", 10000)) / freqs
        assert ratios[0] == 1 and ratios.max() > 1.5 and len({round(r, 3) for r in ratios.tolist()}) > 2, method


@pytest.mark.parametrize(
    "extra_config",
    [
        dict(factor=8.0, low_freq_factor=1.0, original_max_seq_len=64),
        dict(factor=8.0, high_freq_factor=4.0),
        dict(beta_fast=32.0, beta_slow=1.0),
        dict(low_freq_factor=1.0, high_freq_factor=4.0, **YARN),
        dict(unknown=1.0),
    ],
)
def test_partial_and_mixed_methods_are_refused(extra_config):
    with pytest.raises(ValueError, match="rope_adjustments"):
        build_rope_cache(LENGTH, N, extra_config=extra_config)


def test_local_base_adds_a_last_dimension():
    cos, sin = build_rope_cache(LENGTH, N, extra_config=dict(factor=8.0), rope_local_base_freq=100.0)
    assert cos.shape == sin.shape == (LENGTH, N, 2)
    everywhere = build_rope_cache(LENGTH, N, extra_config=dict(factor=8.0))
    local = build_rope_cache(LENGTH, N, base=100.0)  # the local base is not scaled
    assert torch.equal(torch.stack((everywhere[0], local[0]), -1), cos)
    assert torch.equal(torch.stack((everywhere[1], local[1]), -1), sin)


def test_rope_cache_of_positions():
    cos, sin = build_rope_cache(LENGTH, N)
    positions = torch.tensor([[3, 4, 5], [0, 1, 2]])
    some = build_rope_cache(LENGTH, N, positions=positions)
    assert torch.equal(some[0], cos[positions]) and torch.equal(some[1], sin[positions])


@pytest.mark.parametrize("variant", ["mha", "neox", "gemma3", "mla"])
def test_the_caches_of_a_model_cover_its_length(variant):
    model = build_model(variant)
    model.max_seq_length = 40
    n = {"mha": 8, "neox": 2, "gemma3": 8, "mla": 4}[variant]
    shape = (40, n, 2) if variant == "gemma3" else (40, n)
    assert model.cos.shape == model.sin.shape == shape and model.rope_cache_length() == n
    assert not {"cos", "sin"} & model.state_dict().keys()


def rotated(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Pairs `(i, i + n / 2)` of the last dimension as complex numbers, turned by `angles` `(T, n / 2)`."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate((z.real, z.imag), axis=-1)


def test_apply_rope_turns_pairs():
    x = torch.randn(2, 3, LENGTH, N)
    cos, sin = build_rope_cache(LENGTH, N)
    angles = np.arange(LENGTH)[:, None] * plain()
    expected = torch.from_numpy(rotated(x.double().numpy(), angles)).float()
    assert_close(apply_rope(x, cos, sin), expected)
    batched = apply_rope(x, cos.expand(2, -1, -1), sin.expand(2, -1, -1))
    assert_close(batched, expected)
    assert apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_apply_rope_takes_another_place_for_each_row():
    x = torch.randn(2, 3, 1, N)
    cos, sin = build_rope_cache(LENGTH, N)
    places = torch.tensor([[5], [17]])
    both = apply_rope(x, cos[places], sin[places])
    for row, place in enumerate((5, 17)):
        alone = apply_rope(x[row : row + 1], cos[place : place + 1], sin[place : place + 1])
        assert_close(both[row : row + 1], alone)


def test_interleaved_rope_turns_neighbours_and_leaves_them_apart():
    x = torch.randn(2, 3, LENGTH, N)
    cos, sin = build_rope_cache(LENGTH, N)
    apart = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    assert_close(apply_rope_interleave(x, cos, sin), apply_rope(apart, cos, sin))


def test_rope_knows_distances_only():
    q, k = torch.randn(1, 1, 1, N), torch.randn(1, 1, 1, N)
    cos, sin = (z.double() for z in build_rope_cache(LENGTH, N))

    def score(i: int, j: int) -> float:
        turned = [apply_rope(x.double(), cos[p : p + 1], sin[p : p + 1]) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum().item()

    assert score(20, 13) == pytest.approx(score(40, 33), rel=1e-5)
    assert score(20, 13) != pytest.approx(score(20, 14), rel=1e-3)


def test_partial_rotary_leaves_the_rest():
    attention = build_model("neox").transformer.h[0].attn
    x = torch.randn(1, 5, 32)
    still = torch.zeros(5, 1, 2)
    turned = attention.project(x, *(z.unsqueeze(-2) for z in build_rope_cache(5, 2)))
    unturned = attention.project(x, still + 1, still)
    for a, b in zip(turned[:2], unturned[:2]):
        assert torch.equal(a[..., 2:], b[..., 2:]) and (a[..., 1:, :2] != b[..., 1:, :2]).all()
    assert torch.equal(turned[2], unturned[2])


def test_longrope_of_a_model_goes_by_the_length_of_the_text_or_cache():
    """Short factors up to the original length, long ones above; with a cache its size decides, so nothing shifts."""
    adjustments = dict(short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 4.0, 8.0], original_max_seq_len=16, factor=1.0)
    model, idx = build_model("gqa", rope_adjustments=adjustments), random_tokens(1, 24)
    as_short = build_model("gqa")
    as_short.load_state_dict(model.state_dict())
    assert_close(model(idx[:, :16]), as_short(idx[:, :16]))
    assert (model(idx) - as_short(idx)).abs().max() > 1e-2
    model.set_kv_cache(1, max_seq_length=24)
    steps = [model(idx[:, i : i + 1], torch.tensor([i])) for i in range(24)]
    assert_close(torch.cat(steps, dim=1), model(idx))


# ---- published functions


def test_yarn_mscale_grows_with_the_logarithm():
    assert yarn_get_mscale(40.0, 0.7) == pytest.approx(0.07 * math.log(40) + 1)
    assert yarn_get_mscale(40.0) == pytest.approx(0.1 * math.log(40) + 1)
    assert yarn_get_mscale(0.5) == yarn_get_mscale(1.0) == yarn_get_mscale() == 1.0


def test_yarn_scales_latent_attention_by_the_square_of_mscale():
    model = build_model("mla", rope_adjustments=YARN | dict(mscale=0.7, mscale_all_dim=1.4))
    assert model.transformer.h[0].attn.scale == pytest.approx(mscale(8, 1.4) ** 2 / math.sqrt(12))
    assert build_model("mla", rope_adjustments=YARN).transformer.h[0].attn.scale == pytest.approx(1 / math.sqrt(12))


def test_softcapping_squeezes():
    x = torch.linspace(-50, 50, 101)
    assert do_softcapping(x, None) is x
    assert_close(do_softcapping(x, 7.0), torch.from_numpy(7 * np.tanh(x.numpy() / 7)))
    assert do_softcapping(x, 7.0).abs().max() <= 7


def test_mask_cache_is_causal():
    mask = build_mask_cache(5)
    assert mask.shape == (1, 1, 5, 5) and mask.dtype == torch.bool
    assert all(mask[0, 0, i, j] == (j <= i) for i in range(5) for j in range(5))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_batched_index_select_picks_in_each_row(dim):
    t = torch.randn(3, 6, 7, 8)
    idx = torch.tensor([[0, 2], [5, 1], [3, 3]])
    expected = torch.stack([row.index_select(dim - 1, i) for row, i in zip(t, idx)])
    assert torch.equal(batched_index_select(t, dim, idx), expected)
    assert torch.equal(batched_index_select(t, dim, idx[1]), t.index_select(dim, idx[1]))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_batched_index_copy_writes_in_each_row(dim):
    t = torch.randn(3, 6, 7, 8)
    idx = torch.tensor([[0, 2], [5, 1], [3, 4]])
    value = torch.randn(*t.shape[:dim], 2, *t.shape[dim + 1 :])
    expected = t.clone()
    for row, i, v in zip(expected, idx, value):
        row.index_copy_(dim - 1, i, v)
    written = t.clone()
    assert batched_index_copy_(written, dim, idx, value).data_ptr() == written.data_ptr()
    assert torch.equal(written, expected) and not torch.equal(written, t)
    assert torch.equal(batched_index_copy_(t.clone(), dim, idx[0], value), t.clone().index_copy_(dim, idx[0], value))
