import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from litgpt import GPT, config
from litgpt.checkpoint import gguf as gguf_module
from litgpt.checkpoint.gguf import write_gguf
from litgpt.checkpoint.lazy import LazyTensor
from litgpt.config import Config
from litgpt.model import rope_frequencies

gguf = pytest.importorskip("gguf")

SIZES = dict(n_layer=2, n_embd=64, n_head=4, n_query_groups=2, intermediate_size=96, block_size=128, name="tiny")
SIZES |= dict(vocab_size=300, padded_vocab_size=320, norm_eps=1e-5)
LONGROPE = dict(short_factor=[1.0] * 8, long_factor=[2.0 + i for i in range(8)], factor=4.0, original_max_seq_len=32)
MODELS: dict[str, tuple[type[Config], dict]] = {
    "llama": (config.LlamaConfig, dict(attn_bias=True)),
    "mistral": (config.MistralConfig, dict(head_size=32)),
    "qwen2": (config.QwenConfig, {}),
    "qwen3": (config.Qwen3Config, dict(head_size=32)),
    "gemma": (config.GemmaConfig, dict(head_size=32)),
    "gemma2": (config.Gemma2Config, dict(head_size=32, sliding_window_size=16)),
    "gemma3_text": (config.Gemma3Config, dict(head_size=32, sliding_window_size=16, rope_adjustments={"factor": 8.0})),
    "phi3": (config.LlamaConfig, dict(rope_adjustments=LONGROPE, tie_embeddings=True)),
}


def build(model_type: str, **fields: Any) -> tuple[Config, dict[str, torch.Tensor]]:
    """Config and random weights, also of norms and biases."""
    kind, own = MODELS[model_type]
    cfg = kind(**{**SIZES, **own, **fields})
    model = GPT(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return cfg, model.state_dict()


def lazy(weights: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in weights.items()}


@pytest.fixture
def written(tmp_path: Path, tiny_tokenizer_dir: Path) -> Callable[..., tuple[Config, dict, dict, dict]]:
    """Writes a file; returns config, our weights, metadata and tensors as the gguf package reads them back."""

    def write(model_type: str, gguf_type: str = "f16", **fields: Any) -> tuple[Config, dict, dict, dict]:
        cfg, weights = build(model_type, **fields)
        path = write_gguf(tmp_path / "m.gguf", lazy(weights), cfg, model_type, tiny_tokenizer_dir, gguf_type)
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
        kinds = {t.name: t.tensor_type.name for t in reader.tensors}
        return cfg, weights, values | {"kinds": kinds}, tensors

    return write


def interleaved(rows: torch.Tensor, n_head: int) -> torch.Tensor:
    """Row i and row i + hs / 2 of each head side by side, written out."""
    out = []
    for head in rows.chunk(n_head):
        half = len(head) // 2
        for i in range(half):
            out += [head[i], head[half + i]]
    return torch.stack(out)


@pytest.mark.parametrize("model_type", MODELS)
def test_file_has_the_weights_of_the_model_in_f16(written: Callable, model_type: str) -> None:
    cfg, weights, values, tensors = written(model_type)
    left = dict(weights)
    shift = 1 if cfg.norm_unit_offset else 0

    def same(name: str, wanted: torch.Tensor) -> None:
        is_matrix = wanted.dim() > 1
        wanted = wanted.half().float() if is_matrix else wanted
        np.testing.assert_array_equal(tensors.pop(name), wanted.numpy(), err_msg=name)
        assert values["kinds"][name] == ("F16" if is_matrix else "F32")

    def norm(name: str, ours: str) -> None:
        same(name, left.pop(ours) + shift)

    same("token_embd.weight", left.pop("transformer.wte.weight"))
    head = left.pop("lm_head.weight")
    if not cfg.tie_embeddings:
        same("output.weight", head)
    norm("output_norm.weight", "transformer.ln_f.weight")
    for i in range(cfg.n_layer):
        ours, theirs = f"transformer.h.{i}.", f"blk.{i}."
        for kind in ("weight", "bias") if cfg.attn_bias else ("weight",):
            qkv = left.pop(f"{ours}attn.qkv.{kind}")
            q, k, v = qkv.split([n * cfg.head_size for n in (cfg.n_head, cfg.n_query_groups, cfg.n_query_groups)])
            if model_type == "phi3":
                same(f"{theirs}attn_qkv.{kind}", qkv)
                continue
            if model_type in ("llama", "mistral"):
                q, k = interleaved(q, cfg.n_head), interleaved(k, cfg.n_query_groups)
            for name, part in (("q", q), ("k", k), ("v", v)):
                same(f"{theirs}attn_{name}.{kind}", part)
        gate, up = (left.pop(f"{ours}mlp.{fc}.weight") for fc in ("fc_1", "fc_2"))
        if model_type == "phi3":
            same(f"{theirs}ffn_up.weight", torch.cat((gate, up)))
        else:
            same(f"{theirs}ffn_gate.weight", gate)
            same(f"{theirs}ffn_up.weight", up)
        same(f"{theirs}ffn_down.weight", left.pop(f"{ours}mlp.proj.weight"))
        same(f"{theirs}attn_output.weight", left.pop(f"{ours}attn.proj.weight"))
        norm(f"{theirs}attn_norm.weight", f"{ours}norm_1.weight")
        norm(f"{theirs}ffn_norm.weight", f"{ours}norm_2.weight")
        if cfg.norm_qk:
            norm(f"{theirs}attn_q_norm.weight", f"{ours}attn.norm_q.weight")
            norm(f"{theirs}attn_k_norm.weight", f"{ours}attn.norm_k.weight")
        if cfg.post_mlp_norm:
            norm(f"{theirs}post_attention_norm.weight", f"{ours}post_attention_norm.weight")
            norm(f"{theirs}post_ffw_norm.weight", f"{ours}post_mlp_norm.weight")
    assert not left, left.keys()
    assert {name for name in tensors if not name.startswith("rope_")} == set()


@pytest.mark.parametrize("model_type", MODELS)
def test_file_describes_the_model(written: Callable, model_type: str) -> None:
    cfg, _, values, _ = written(model_type)
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(model_type, model_type)
    wanted = {
        "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96, "vocab_size": 320,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": cfg.head_size,
        "attention.value_length": cfg.head_size, "rope.dimension_count": cfg.head_size, "rope.freq_base": cfg.rope_base,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
    }  # fmt: skip
    if model_type == "gemma2":
        wanted |= {"attention.sliding_window": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if model_type == "gemma3_text":
        wanted |= {"attention.sliding_window": 16, "rope.freq_base_swa": 10000.0}
        wanted |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    if model_type == "phi3":
        scale = (1 + np.log(4) / np.log(32)) ** 0.5
        wanted |= {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 32}
        wanted |= {"rope.scaling.attn_factor": pytest.approx(scale)}
    found = {key.removeprefix(f"{arch}."): value for key, value in values.items() if key.startswith(f"{arch}.")}
    assert found == wanted
    assert values["general.architecture"] == arch and values["general.name"] == "tiny"
    assert values["general.file_type"] == 1


def test_llama3_rope_is_a_tensor_of_divisors(written: Callable) -> None:
    llama3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64)
    cfg, _, values, tensors = written("llama", rope_adjustments=llama3)
    divisors = torch.from_numpy(tensors["rope_freqs.weight"].copy())
    plain = 1.0 / cfg.rope_base ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / divisors, rope_frequencies(16, cfg.rope_base, llama3, 128)[0])
    assert divisors[0] == 1 and divisors[-1] == 8
    assert not any("scaling" in key for key in values)


def test_longrope_factors_are_tensors(written: Callable) -> None:
    _, _, _, tensors = written("phi3")
    assert tensors["rope_factors_long.weight"].tolist() == LONGROPE["long_factor"]
    assert tensors["rope_factors_short.weight"].tolist() == LONGROPE["short_factor"]


def test_yarn_and_condensed_positions_are_settings(written: Callable) -> None:
    yarn = dict(factor=4.0, beta_fast=32.0, beta_slow=1.0, original_max_seq_len=32)
    _, _, values, _ = written("qwen2", rope_adjustments=yarn)
    found = {key.removeprefix("qwen2.rope.scaling."): v for key, v in values.items() if "rope.scaling" in key}
    wanted = {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 32,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
    }
    assert found == wanted | {"attn_factor": 1.0}  # of YaRN's own, which llama.cpp computes
    _, _, values, _ = written("qwen2", rope_adjustments=yarn | {"attention_factor": 2.0})
    assert values["qwen2.rope.scaling.attn_factor"] == pytest.approx(2 / (0.1 * np.log(4) + 1))
    _, _, values, _ = written("llama", rope_condense_ratio=8)
    assert (values["llama.rope.scaling.type"], values["llama.rope.scaling.factor"]) == ("linear", 8.0)


def test_untied_model_keeps_its_head_and_a_tied_one_has_none(written: Callable) -> None:
    assert "output.weight" in written("qwen2")[3]
    assert "output.weight" not in written("qwen2", tie_embeddings=True)[3]


def test_bf16_is_rounded_to_the_nearest(written: Callable) -> None:
    _, weights, values, tensors = written("llama", "bf16")
    wanted = weights["transformer.wte.weight"].bfloat16().float().numpy()
    np.testing.assert_array_equal(tensors["token_embd.weight"], wanted)
    assert values["kinds"]["blk.0.ffn_up.weight"] == "BF16" and values["kinds"]["blk.0.attn_norm.weight"] == "F32"
    assert values["general.file_type"] == 32


def test_q8_0_is_near_and_falls_back_where_rows_do_not_divide(written: Callable) -> None:
    _, weights, values, tensors = written("llama", "q8_0", intermediate_size=80)
    ours = weights["transformer.h.0.mlp.fc_2.weight"].numpy()
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    np.testing.assert_array_equal(
        tensors["blk.0.ffn_up.weight"], gguf.quants.dequantize(gguf.quants.quantize(ours, q8_0), q8_0)
    )
    difference = np.abs(tensors["blk.0.ffn_up.weight"] - weights["transformer.h.0.mlp.fc_2.weight"].numpy())
    blocks = weights["transformer.h.0.mlp.fc_2.weight"].view(-1, 32).abs().amax(1)
    assert (difference.reshape(-1, 32).max(1) <= (blocks / 127 * 0.57).numpy()).all() and difference.max() > 0
    kinds = values["kinds"]
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0" and kinds["blk.0.ffn_down.weight"] == "F16"
    assert values["general.file_type"] == 7 and values["general.quantization_version"] == 2


@pytest.mark.parametrize("gguf_type", ["f16", "q8_0"])
def test_pieces_of_large_tensors_join(monkeypatch: pytest.MonkeyPatch, written: Callable, gguf_type: str) -> None:
    torch.manual_seed(3)
    whole = written("llama", gguf_type)[3]
    monkeypatch.setattr(gguf_module, "_PIECE", 96)
    torch.manual_seed(3)
    pieces = written("llama", gguf_type)[3]
    assert whole.keys() == pieces.keys() and all(np.array_equal(whole[name], pieces[name]) for name in whole)


def test_number_beyond_f16_is_refused_and_bf16_takes_it(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    cfg, weights = build("llama")
    weights["lm_head.weight"][3, 4] = 1e5
    with pytest.raises(ValueError, match=r"output\.weight .* range of f16; choose `--gguf_type bf16`"):
        write_gguf(tmp_path / "m.gguf", lazy(weights), cfg, "llama", tiny_tokenizer_dir)
    assert list(tmp_path.glob("*.gguf")) == [] and list(tmp_path.glob(".*")) == []
    write_gguf(tmp_path / "m.gguf", lazy(weights), cfg, "llama", tiny_tokenizer_dir, "bf16")


@pytest.mark.parametrize(
    ("model_type", "fields", "match"),
    [
        ("olmo2", {}, "no GGUF export for a olmo2 model"),
        ("llama", dict(bias=True), "bias True"),
        ("llama", dict(mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2), "mlp_class_name 'LLaMAMoE'"),
        ("llama", dict(rotary_percentage=0.5), "rotary_percentage 0.5"),
        ("llama", dict(causal=False), "causal False"),
        ("qwen2", dict(head_size=32), "head_size 32"),
        ("qwen2", dict(attn_bias=False), "attn_bias False"),
        ("qwen3", dict(norm_qk_type="olmo2"), "norm_qk_type 'olmo2'"),
        ("qwen2", dict(rope_adjustments=LONGROPE), "longrope rope_adjustments"),
        ("gemma2", dict(sliding_window_indices=[1, 1]), "windows in other layers"),
        ("gemma2", dict(attention_logit_softcapping=None), "attention_logit_softcapping None"),
        ("gemma2", dict(attention_scores_scalar=16), "attention_scores_scalar 16, only 32"),
        ("gemma2", dict(tie_embeddings=False), "tie_embeddings False"),
        ("gemma3_text", dict(sliding_window_size=None), "sliding_window_size None"),
    ],
)
def test_what_llama_cpp_lacks_is_refused_by_name(
    tmp_path: Path, tiny_tokenizer_dir: Path, model_type: str, fields: dict, match: str
) -> None:
    kind, own = MODELS.get(model_type, MODELS["llama"])
    cfg = kind(**{**SIZES, **own, **fields})
    with pytest.raises(ValueError, match=match) as error:
        write_gguf(tmp_path / "m.gguf", {}, cfg, model_type, tiny_tokenizer_dir)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_27b_sizes_of_gemma_scale_by_width_over_heads() -> None:
    sizes = SIZES | dict(n_layer=46, head_size=32, sliding_window_size=16)
    gguf_module.find_architecture(config.Gemma2Config(**sizes, attention_scores_scalar=16), "gemma2")
    with pytest.raises(ValueError, match="only 16"):
        gguf_module.find_architecture(config.Gemma2Config(**sizes), "gemma2")


def test_window_that_llama_cpp_ignores_is_told() -> None:
    with pytest.warns(UserWarning, match="beyond 16 tokens"):
        gguf_module.find_architecture(config.MistralConfig(**SIZES, sliding_window_size=16), "mistral")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop("transformer.h.1.norm_2.weight"), r"lack transformer\.h\.1\.norm_2\.weight"),
        (lambda w: w.update({"transformer.h.0.attn.lora": torch.ones(2)}), "has no place"),
        (lambda w: w.update({"lm_head.weight": torch.ones(319, 64)}), r"\(319, 64\), but the config says \(320, 64\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, tiny_tokenizer_dir: Path, change: Callable, match: str
) -> None:
    cfg, weights = build("llama")
    weights = dict(weights)
    change(weights)
    with pytest.raises(ValueError, match=match):
        write_gguf(tmp_path / "m.gguf", lazy(weights), cfg, "llama", tiny_tokenizer_dir)


def test_a_name_that_llama_cpp_takes_for_phi_3_is_changed_without_its_tokens(written: Callable) -> None:
    assert written("phi3", name="my-Phi-3-mini")[2]["general.name"] == "my-Phi 3-mini"


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"litgpt\[gguf\]"):
        write_gguf(tmp_path / "m.gguf", {}, build("llama")[0], "llama", tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_holds_no_second_model(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    code = f"""
import torch
from litgpt import GPT, config
from litgpt.checkpoint.gguf import write_gguf
from litgpt.checkpoint.lazy import LazyTensor
import gguf, tokenizers
cfg = config.LlamaConfig(n_layer=20, n_embd=512, n_head=4, intermediate_size=2048, padded_vocab_size=320)
with torch.device("meta"):
    shapes = {{name: tuple(p.shape) for name, p in GPT(cfg).named_parameters()}}
lazy = {{n: LazyTensor(s, torch.float32, lambda s=s: torch.ones(s)) for n, s in shapes.items()}}
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = peak()
path = write_gguf({str(tmp_path / "m.gguf")!r}, lazy, cfg, "llama", {str(tiny_tokenizer_dir)!r}, "q8_0")
print(path.stat().st_size, peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    size, grown = map(int, out.split())
    # code that loads on first use, and the tensor at hand several times over, are part of the growth
    assert size > 80e6 and grown < 0.7 * size
