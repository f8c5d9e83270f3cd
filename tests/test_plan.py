import math

import pytest
import torch
from benchmarks.plan_memory import RECIPES, TOLERANCE, measure, predict
from model_variants import VARIANTS, build_model, config_of

from litgpt import Config, estimate_model_memory, plan, utils
from litgpt.generate.decoding import Decoder
from litgpt.optimizers import build_optimizer
from litgpt.plan import (
    PREFILL_CHUNK,
    RunSettings,
    count_parameters,
    estimate_flops,
    flops_per_param,
    flops_per_token,
    plan_run,
    rank_knobs,
)

CPU = dict(device="cpu", batch_size=2, seq_length=32)


@pytest.mark.parametrize("name", RECIPES)
def test_predicted_memory_is_within_ten_percent_of_the_measured(name):
    assert predict(RECIPES[name]) == pytest.approx(measure(RECIPES[name]), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Mixtral-8x7B-v0.1", 46_702_792_704, 12_879_925_248),
        ("Qwen3-30B-A3B", 30_532_122_624, 3_353_032_704),
        ("pythia-160m", 162_322_944, 162_322_944),
        ("SmolLM2-135M", 134_515_008, 134_515_008),
    ],
)
def test_parameters_of_published_models_are_counted(name, total, active):
    assert count_parameters(Config.from_name(name)) == (total, active)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seq_length", [4, 64])
def test_counts_and_flops_are_those_that_the_model_reports(variant, seq_length):
    config, size = config_of(variant), build_model(variant).get_nparams_and_flops(seq_length)
    assert count_parameters(config) == (size.total, size.active)
    assert flops_per_token(config, seq_length) == size.flops_per_token
    assert flops_per_token(config, seq_length, training=False) * 3 == size.flops_per_token


def test_flops_of_a_sequence_count_frozen_weights_as_less():
    model = build_model()
    n = sum(p.numel() for p in model.parameters())
    forward = flops_per_param(64, 3, 32, n)
    assert forward == 2 * n * 64 + 3 * 4 * 32 * 64**2
    assert (estimate_flops(model, training=False), estimate_flops(model, training=True)) == (forward, 3 * forward)
    model.requires_grad_(False)
    assert estimate_flops(model, training=True) == 2 * forward


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon", "SGD", "RMSprop", "Adagrad"])
def test_optimizer_takes_the_bytes_of_its_real_state(optimizer):
    model = build_model("gqa")
    optimizer_class = build_optimizer(optimizer, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer_class.step()
    tensors = [v for state in optimizer_class.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    real = sum(t.numel() * t.element_size() for t in tensors if t.dim())
    planned = plan_run(config_of("gqa"), RunSettings("full", precision="32-true", optimizer=optimizer, **CPU))
    assert planned.optimizer == real


def test_lora_trains_its_matrices_alone():
    planned = plan_run(config_of("gqa"), RunSettings("lora", precision="32-true", lora_r=4, **CPU))
    n_trained = 3 * (2 * 4 * 32 + 4 * (32 + 16))  # layers x (A of queries and values + their B)
    assert planned.trained_parameters == n_trained
    assert (planned.gradients, planned.optimizer) == (4 * n_trained, 8 * n_trained)


def test_four_bit_weights_are_those_of_the_blocks_linears():
    config = config_of()
    quantized, plain = (
        plan_run(config, RunSettings("generate", quantize=flag, precision="bf16-true", **CPU)) for flag in (True, False)
    )
    n_linears = config.n_layer * (32 * 96 + 32 * 32 + 3 * 32 * 48)
    assert plain.weights - quantized.weights == n_linears * 2 - math.floor(n_linears * 4.5 / 8)


def test_more_devices_share_what_fsdp_shards():
    config = Config.from_name("pythia-1b")
    one, eight = (plan_run(config, RunSettings("pretrain", devices=n)) for n in (1, 8))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(eight, part) == getattr(one, part) // 8
    assert one.activations < eight.activations < one.activations + 2 * one.weights  # weights gathered for use


def test_accumulated_gradients_are_there_at_the_peak():
    config = config_of(n_embd=128, padded_vocab_size=1000, block_size=512)
    long = dict(device="cpu", batch_size=4, seq_length=512, precision="32-true")
    kept, fresh = (plan_run(config, RunSettings("pretrain", accumulate=flag, **long)) for flag in (True, False))
    assert kept.gradients == 4 * count_parameters(config).total > fresh.gradients
    assert kept.total > fresh.total


@pytest.mark.parametrize("task", ["pretrain", "full", "lora", "qlora", "generate"])
def test_knobs_are_tried_and_ranked_by_what_they_save(task):
    config = Config.from_name("Llama-3.2-1B")
    settings = RunSettings(task, batch_size=4, seq_length=1024)
    knobs, now = rank_knobs(config, settings), plan_run(config, settings).total
    assert len(knobs) >= 3
    assert [k.saved for k in knobs] == sorted((k.saved for k in knobs), reverse=True)
    assert all(knob.total == now - knob.saved < now for knob in knobs)


def test_the_best_knob_depends_on_what_takes_the_memory():
    model = Config.from_name("Llama-3.2-1B")
    short, long = (rank_knobs(model, RunSettings("full", 1, n))[0].change for n in (128, 131072))
    assert short == "finetune_lora instead"
    assert long == "--activation_checkpointing true"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(batch_size=0), "--batch_size is 0; it must be at least 1"),
        (dict(devices=-1), "--devices is -1"),
        (dict(lora_r=0), "--lora_r is 0"),
        (dict(lora_dropout=1.0), "--lora_dropout is 1.0"),
        (dict(precision="fp8"), "--precision is 'fp8'; choose one of 32-true"),
        (dict(optimizer="AdamX"), "--optimizer 'AdamX': did you mean Adam"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        RunSettings(**fields)


def test_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="--seq_length is 65; the context of tiny has 64 tokens"):
        plan_run(config_of(), RunSettings(seq_length=65))


def test_prefill_chunk_is_that_of_the_decoder():
    assert Decoder(build_model()).chunk == PREFILL_CHUNK


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_estimate_has_the_published_keys_and_counts_experts(monkeypatch, dtype):
    monkeypatch.setattr(plan, "gpu_memory_bytes", lambda: None)
    found = estimate_model_memory(Config.from_name("Mixtral-8x7B-v0.1"), dtype)
    assert found["param_count"] == 46_702_792_704
    assert found["param_memory_gb"] == pytest.approx(93.4, abs=0.1)
    assert found["param_memory_gb"] < found["estimated_total_gb"] < 1.1 * found["param_memory_gb"]
    assert found["available_gpu_memory_gb"] is None and found["fits_in_memory"] is None


def test_estimate_says_whether_a_model_fits_the_gpu(monkeypatch):
    monkeypatch.setattr(plan, "gpu_memory_bytes", lambda: 24 * 10**9)
    config = Config.from_name("Llama-3.1-8B")
    inference, training = (utils.estimate_model_memory(config, torch.bfloat16, training=t) for t in (False, True))
    assert (inference["fits_in_memory"], training["fits_in_memory"]) == (True, False)
    assert inference["available_gpu_memory_gb"] == 24
    with pytest.raises(ValueError, match="dtype is int8"):
        estimate_model_memory(config, torch.int8)


def test_gpu_memory_is_that_of_the_smallest_gpu(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 24564\necho 12288\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert plan.gpu_memory_bytes() == 12288 * 2**20
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert plan.gpu_memory_bytes() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program.write_text("#!/bin/sh\necho no driver >&2\nexit 9\n")
    assert plan.gpu_memory_bytes() is None
