"""config.json to Config and back: both spellings, defaults, what is refused, and values that nobody should trust."""

import json
import time
import warnings
from dataclasses import asdict
from typing import Any

import pytest

from litgpt.checkpoint.adapter import find_model_type
from litgpt.checkpoint.hf_config import (
    UnsupportedArchitecture,
    config_from_hf,
    config_to_hf,
    folder_name,
    hf_dtype,
    read_hf_config,
)
from litgpt.checkpoint.hf_families import FAMILIES
from litgpt.config import Config, name_to_config

SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)


def tiny(model_type: str, **values: Any) -> dict[str, Any]:
    """A config.json with small sizes."""
    return SIZES | dict(model_type=model_type) | values


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return asdict(config_from_hf(a)) == asdict(config_from_hf(b))


# ---- reading

YARN = dict(factor=4.0, original_max_position_embeddings=512, beta_fast=16)
LONG = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4)
SPELLINGS = {
    "llama, base": (
        tiny("llama", rope_theta=500000.0, rope_scaling=None),
        tiny("llama", rope_parameters=dict(rope_theta=500000.0, rope_type="default")),
    ),
    "llama, type": (
        tiny("llama", rope_theta=7e4, rope_scaling=dict(type="linear", factor=2.0)),
        tiny("llama", rope_parameters=dict(rope_theta=7e4, rope_type="linear", factor=2.0)),
    ),
    "llama, rope_type": (
        tiny("llama", rope_theta=7e4, rope_scaling=dict(rope_type="yarn", **YARN)),
        tiny("llama", rope_parameters=dict(rope_theta=7e4, rope_type="yarn", **YARN)),
    ),
    "phi-3, older names": (
        tiny("phi3", original_max_position_embeddings=16, rope_scaling=dict(type="su", **LONG)),
        tiny("phi3", original_max_position_embeddings=16, rope_parameters=dict(rope_type="longrope", **LONG)),
    ),
    "phi-4-mini, share of the head": (
        tiny("phi3", partial_rotary_factor=0.75),
        tiny("phi3", rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75)),
    ),
    "gpt-neox": (
        tiny("gpt_neox", rotary_pct=0.5, rotary_emb_base=5000),
        tiny("gpt_neox", rope_parameters=dict(rope_type="default", rope_theta=5000.0, partial_rotary_factor=0.5)),
    ),
    "gemma-3": (
        tiny("gemma3_text", sliding_window_pattern=2, rope_theta=4e5, rope_local_base_freq=300.0,
             rope_scaling=dict(rope_type="linear", factor=8.0)),
        tiny("gemma3_text", layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=4e5),
            sliding_attention=dict(rope_type="default", rope_theta=300.0))),
    ),
    "olmo-3": (
        tiny("olmo3", rope_theta=4e5, rope_scaling=dict(rope_type="yarn", **YARN)),
        tiny("olmo3", layer_types=["sliding_attention"] * 3 + ["full_attention"], rope_parameters=dict(
            full_attention=dict(rope_type="yarn", rope_theta=4e5, **YARN),
            sliding_attention=dict(rope_type="default", rope_theta=4e5))),
    ),
    "qwen3, windows": (
        tiny("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=3),
        tiny("qwen3", use_sliding_window=True, sliding_window=8,
             layer_types=["full_attention"] * 3 + ["sliding_attention"]),
    ),
    "qwen3-moe, count of experts": (
        tiny("qwen3_moe", num_experts=16, num_experts_per_tok=4),
        tiny("qwen3_moe", num_local_experts=16, num_experts_per_tok=4),
    ),
    "smollm3, layers without rope": (
        tiny("smollm3", no_rope_layer_interval=2),
        tiny("smollm3", no_rope_layers=[1, 0, 1, 0]),
    ),
    "activation": (tiny("gpt_neox", hidden_act="gelu_new"), tiny("gpt_neox", hidden_act="gelu_pytorch_tanh")),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_both_spellings_give_the_same_config(name):
    older, newer = SPELLINGS[name]
    assert same(older, newer)
    assert not same(older, tiny(older["model_type"]))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_missing_keys_have_the_defaults_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    given = {"num_experts_per_tok": 2} if model_type == "deepseek_v2" else {}
    full = transformers.AutoConfig.for_model(model_type, **given).to_dict()
    assert same({"model_type": model_type, **given}, full)
    assert same({"architectures": [FAMILIES[model_type].architecture], **given}, full)


def test_null_counts_as_missing_where_it_says_nothing():
    assert same(tiny("qwen3", head_dim=None, rope_theta=None, hidden_act=None), tiny("qwen3"))
    assert config_from_hf(tiny("mistral", sliding_window=None)).sliding_window_size is None
    assert config_from_hf(tiny("mistral", num_key_value_heads=None)).n_query_groups == 4


HUB = {
    "Llama-3.1-8B": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        rms_norm_eps=1e-05, rope_theta=500000.0, vocab_size=128256, tie_word_embeddings=False, pretraining_tp=1,
        rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=8192, rope_type="llama3"),
    ),
    "Gemma-2-2b": dict(
        architectures=["Gemma2ForCausalLM"], model_type="gemma2", hidden_size=2304, intermediate_size=9216,
        num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=256000,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=256, sliding_window=4096,
        max_position_embeddings=8192, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
    ),
    "falcon-7b": dict(
        architectures=["FalconForCausalLM"], model_type="falcon", alibi=False, bias=False, hidden_size=4544,
        num_attention_heads=71, num_hidden_layers=32, num_kv_heads=71, multi_query=True, parallel_attn=True,
        new_decoder_architecture=False, layer_norm_epsilon=1e-05, vocab_size=65024,
        auto_map={"AutoModel": "modeling_falcon.FalconModel"},
    ),
    "Qwen3-30B-A3B": dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", decoder_sparse_step=1, head_dim=128,
        hidden_size=2048, intermediate_size=6144, max_position_embeddings=40960, max_window_layers=48,
        mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_attention_heads=32, num_experts=128,
        num_experts_per_tok=8, num_hidden_layers=48, num_key_value_heads=4, rms_norm_eps=1e-06, rope_theta=1000000.0,
        sliding_window=None, use_sliding_window=False, vocab_size=151936, attention_bias=False,
    ),
}  # fmt: skip
"""From the hub, as published."""


@pytest.mark.parametrize("name", HUB)
def test_published_file_gives_the_named_config(name):
    named, built = asdict(Config.from_name(name)), asdict(config_from_hf(HUB[name], name))
    assert {key: (value, built[key]) for key, value in named.items() if built[key] != value} == {}


def test_name_keeps_what_config_json_does_not_decide():
    values = HUB["Llama-3.1-8B"] | dict(num_hidden_layers=3, vocab_size=128512)
    config = config_from_hf(values, "meta-llama/Meta-Llama-3.1-8B")
    assert (config.name, config.hf_config["org"]) == ("Llama-3.1-8B", "meta-llama")
    assert (config.vocab_size, config.padded_vocab_size, config.n_layer) == (128000, 128512, 3)
    other = config_from_hf(values, "someone/own-model")
    assert (other.name, other.hf_config) == ("own-model", {"org": "someone", "name": "own-model"})
    assert other.vocab_size == 128512


def test_name_never_decides_the_maths():
    values = tiny("llama")
    plain = asdict(config_from_hf(values))
    for name in ("Gemma-2b", "OLMo-1B-hf", "pythia-14m", "LLaMA-2-7B-32K"):
        named = asdict(config_from_hf(values, name))
        assert {key for key in plain if plain[key] != named[key]} <= {
            "name", "hf_config", "padding_multiple", "vocab_size"
        }  # fmt: skip


def test_dtype_is_read_in_both_spellings():
    assert hf_dtype({"torch_dtype": "bfloat16"}) == hf_dtype({"dtype": "torch.bfloat16"}) == "bfloat16"
    assert hf_dtype({}) is None


# ---- what is refused

REFUSED = [
    ("falcon", dict(alibi=True), "alibi"),
    ("falcon", dict(parallel_attn=False), "parallel_attn"),
    ("olmo", dict(clip_qkv=8.0), "clip_qkv"),
    ("phi", dict(qk_layernorm=True), "qk_layernorm"),
    ("stablelm", dict(qk_layernorm=True), "qk_layernorm"),
    ("stablelm", dict(head_dim=16), "head_dim"),
    ("llama", dict(attention_bias=True), "mlp_bias"),
    ("llama", dict(mlp_bias=True), "attention_bias"),
    ("seed_oss", dict(attention_out_bias=True), "attention_out_bias"),
    ("qwen3", dict(attention_bias=True), "attention_bias"),
    ("gpt_neox", dict(attention_bias=False), "attention_bias"),
    ("llama", dict(hidden_act="relu"), "relu"),
    ("mixtral", dict(hidden_act="gelu"), "gelu"),
    ("gpt_neox", dict(hidden_act="silu"), "silu"),
    ("llama", dict(rope_scaling=dict(type="dynamic", factor=2.0)), "dynamic"),
    ("llama", dict(rope_parameters=dict(rope_type="proportional", rope_theta=1e4)), "proportional"),
    ("qwen2", dict(rope_scaling=dict(type="default", mrope_section=[2, 1, 1])), "mrope_section"),
    ("phi3", dict(rope_scaling=dict(type="longrope", **LONG, short_mscale=1.1)), "short_mscale"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("llama", dict(rope_theta=10000.5), "10000.5"),
    ("gemma3_text", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)), "rope_parameters"),
    ("llama", dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), "rope_parameters"),
    ("qwen3", dict(use_sliding_window=True, layer_types=["linear_attention"] * 4), "linear_attention"),
    ("qwen3_moe", dict(mlp_only_layers=[0]), "mlp_only_layers"),
    ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step"),
    ("deepseek_v3", dict(scoring_func="softmax"), "scoring_func"),
    ("deepseek_v3", dict(moe_layer_freq=2), "moe_layer_freq"),
    ("deepseek_v2", dict(topk_method="other"), "topk_method"),
    ("deepseek_v2", dict(norm_topk_prob=True), "norm_topk_prob"),
    ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ("llama", dict(per_layer_config={"0": {"hidden_act": "gelu"}}), "per_layer_config"),
    ("llama", dict(quantization_config=dict(quant_method="gptq", bits=4)), "gptq"),
    ("llama", dict(quantization_config=dict(quant_method="fp8", weight_block_size=None)), "blocks"),
]


@pytest.mark.parametrize(("model_type", "values", "word"), REFUSED)
def test_missing_feature_is_named(model_type, values, word):
    config_from_hf(tiny(model_type, num_experts_per_tok=2, num_key_value_heads=4))
    with pytest.raises(ValueError, match=f"{model_type}.*does not have.*{word}") as error:
        config_from_hf(tiny(model_type, num_experts_per_tok=2, num_key_value_heads=4) | values)
    assert "\n" not in str(error.value)


def test_fp8_in_blocks_and_code_of_others_are_no_reason_to_refuse():
    fp8 = dict(quant_method="fp8", weight_block_size=[128, 128], fmt="e4m3", activation_scheme="dynamic")
    assert same(tiny("llama", quantization_config=fp8, auto_map={"AutoConfig": "evil.Config"}), tiny("llama"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (tiny("qwen4"), "'qwen4'.*did you mean.*qwen3.*Known are llama"),
        (tiny("mamba2"), "'mamba2' is not supported"),
        (dict(architectures=["T5ForConditionalGeneration"]), "t5forconditionalgeneration"),
        (
            tiny("llama", architectures=["LlamaForSequenceClassification"]),
            "llamaforsequenceclassification is not supported for llama",
        ),
        ({}, "not supported"),
    ],
)
def test_unknown_architecture_is_refused_with_the_nearest_names(values, words):
    with pytest.raises(UnsupportedArchitecture, match=words):
        config_from_hf(values)


HOSTILE = [
    None, True, False, 0, -1, 1, 2.5, 1e-300, 1e300, 10**30, float("nan"), float("inf"), "x", "silu", [], [1], [{}],
    {}, {"a": None}, {"rope_type": ["x"]}, {"full_attention": []},
]  # fmt: skip
ROPE = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=64) | LONG
ROPE |= dict(low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.filterwarnings("ignore:.*only the text part")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_value_does_more_than_a_value_error(model_type):
    other = "model_type architectures rope_scaling rope_parameters text_config quantization_config layer_types head_dim"
    cases = [{key: value} for key in [*FAMILIES[model_type].keys, *other.split()] for value in HOSTILE]
    for kind in ("linear", "llama3", "yarn", "longrope"):
        rope = ROPE | {"rope_type": kind}
        cases += [{"rope_scaling": rope | {key: value}} for key in [*rope, "truncate"] for value in HOSTILE]
    for case in cases:
        began = time.perf_counter()
        try:
            config_from_hf(tiny(model_type, num_experts_per_tok=2) | case)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 700, case
        assert time.perf_counter() - began < 2, case


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(num_hidden_layers=10**9), "n_layer"),
        (dict(num_hidden_layers="4"), "num_hidden_layers is 4; it must be a whole number"),
        (dict(hidden_size=-32), "hidden_size"),
        (dict(vocab_size=2**30), "padded_vocab_size"),
        (dict(num_hidden_layers=4000, num_local_experts=10000), "10,000 experts"),
        (dict(rope_theta=0), "rope_theta"),
        (dict(rope_scaling=dict(rope_type="linear", factor=-1.0)), "factor"),
        (dict(rope_scaling="linear"), "rope_scaling"),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings is yes; it must be true or false"),
    ],
)
def test_senseless_value_is_refused_by_its_key(values, words):
    with pytest.raises(ValueError, match=words):
        config_from_hf(tiny("mixtral") | values)


# ---- files


def test_file_or_folder_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny("llama")), encoding="utf-8-sig")
    assert read_hf_config(tmp_path) == read_hf_config(tmp_path / "config.json") == tiny("llama")


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not valid JSON"), ("[]", "holds a list"), ("[" * 100000, "not valid JSON"), ("\xff", "not valid JSON")],
)
def test_file_that_is_no_config_is_refused(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=words) as error:
        read_hf_config(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_and_oversized_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is not there"):
        read_hf_config(tmp_path)
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**26)
    with pytest.raises(ValueError, match="67,108,864 bytes"):
        read_hf_config(tmp_path)


def test_text_part_is_taken_with_a_notice(tmp_path):
    text = dict(model_type="gemma3_text", hidden_size=2560, num_hidden_layers=34, sliding_window=1024)
    text |= dict(intermediate_size=10240, rope_scaling=dict(factor=8.0, rope_type="linear"))
    outer = dict(
        architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", text_config=text,
        vision_config=dict(hidden_size=1152), torch_dtype="bfloat16",
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(outer))
    with pytest.warns(UserWarning, match="gemma3 model only the text part is used, vision left out"):
        values = read_hf_config(tmp_path)
    assert values == text | {"torch_dtype": "bfloat16"}
    built, named = (asdict(c) for c in (config_from_hf(values, "gemma-3-4b-it"), Config.from_name("Gemma-3-4b-it")))
    # the file has rows for image tokens too
    assert {key for key in named if named[key] != built[key]} == {"padded_vocab_size"}
    del text["model_type"]
    with pytest.warns(UserWarning, match="text part"):
        assert same(outer, values)


# ---- writing


@pytest.mark.filterwarnings("ignore:.*by name alone")
def test_every_named_config_is_written_and_read_back():
    for name in name_to_config:
        config = Config.from_name(name)
        values = config_to_hf(config, find_model_type(config))
        assert config_to_hf(config_from_hf(values, name), values["model_type"]) == values, name


LOST = [
    ("llama", dict(parallel_residual=True), "parallel_residual"),
    ("llama", dict(norm_qk=True), "norm_qk"),
    ("llama", dict(attn_bias=True), "biases"),
    ("llama", dict(sliding_window_size=8), "sliding_window_size"),
    ("llama", dict(rotary_percentage=0.5), "rotary_percentage"),
    ("llama", dict(causal=False), "causal"),
    ("llama", dict(logits_scaling=2.0), "logits_scaling"),
    ("llama", dict(nope_indices=[1, 0]), "nope_indices"),
    ("llama", dict(attention_scores_scalar=3), "attention_scores_scalar"),
    ("llama", dict(rope_condense_ratio=2, rope_adjustments=dict(factor=2.0, original_max_seq_len=8, low_freq_factor=1.0,
                                                                high_freq_factor=4.0)), "rope_base"),
    ("mistral", dict(sliding_window_size=8, sliding_window_indices=[0, 1]), "sliding_window_size"),
    ("qwen2", dict(attn_bias=False), "attn_bias"),
    ("phi3", dict(rope_adjustments=dict(factor=2.0)), "linear"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "fields", "word"), LOST)
def test_what_a_model_type_cannot_say_is_refused(model_type, fields, word):
    config = asdict(config_from_hf(tiny(model_type, num_hidden_layers=2, sliding_window=None)))
    config_to_hf(Config(**config), model_type)
    with pytest.raises(ValueError, match=f"cannot be written as {model_type}.*{word}"):
        config_to_hf(Config(**config | fields), model_type)


def test_condensed_positions_are_written_as_linear_scaling():
    config = Config.from_name("LLaMA-2-7B-32K")
    assert config_to_hf(config, "llama")["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_phi_3_gets_exactly_the_keys_that_transformers_4_allows():
    values = tiny("phi3", max_position_embeddings=64, original_max_position_embeddings=16)
    written = config_to_hf(config_from_hf(values | dict(rope_scaling=dict(type="longrope", **LONG))), "phi3")
    assert written["rope_scaling"] == {"type": "longrope", **LONG}
    assert written["original_max_position_embeddings"] == 16


def test_token_ids_and_dtype_are_written_in_both_spellings():
    config = config_from_hf(tiny("llama"))
    values = config_to_hf(config, "llama", "torch.bfloat16", bos_token_id=1, eos_token_id=[2, 3])
    assert (values["dtype"], values["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, [2, 3], None)
    assert json.loads(json.dumps(values)) == values


def test_unknown_model_type_cannot_be_written():
    with pytest.raises(UnsupportedArchitecture, match=r"'lama'.*did you mean.*llama"):
        config_to_hf(config_from_hf(tiny("llama")), "lama")


@pytest.mark.parametrize("path", [".", "../phi-3", "below/.."])
def test_folder_has_its_name_from_wherever_one_looks(tmp_path, monkeypatch, path):
    (tmp_path / "phi-3" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "phi-3")
    assert folder_name(path) == "phi-3"


def test_left_out_part_is_named_unless_the_file_is_read_again(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma3", "text_config": {}, "vision_config": {}}')
    with pytest.warns(UserWarning, match="only the text part is used, vision left out"):
        values = read_hf_config(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_hf_config(tmp_path, is_quiet=True) == values
