"""Configs: the table against what 0.5.13 published, how fields resolve, and where a config comes from."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

import litgpt.config as config_module
from litgpt.config import (
    Config,
    DeepseekConfig,
    Gemma2Config,
    Gemma3Config,
    GemmaConfig,
    LlamaConfig,
    OLMoConfig,
    check_indicator_and_length,
    configs,
    find_multiple,
    name_to_config,
    nearest,
    register_mlp,
    register_norm,
    rope_kind,
    save_config,
)

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "model_configs.json").read_text())
PUBLISHED_BY_NAME = {row["name"]: row for row in PUBLISHED["configs"]}
NAMES = list(PUBLISHED_BY_NAME)
NEW_FIELDS = (
    "causal", "dropout", "tie_embeddings", "norm_unit_offset", "norm_affine", "embedding_multiplier",
    "residual_multiplier", "logits_scaling", "nope_indices", "router_scoring",
)  # fmt: skip

_GEMMA_EPS = "Transformers' Gemma, Gemma 2 and Gemma 3 use 1e-6; 0.5.13 left the field at its default"
_LONGROPE = "131,072 is reached by LongRoPE only, and its factors are not known by name; this is the original context"
DIFFERENCES = {
    **{(name, "norm_eps"): (1e-6, _GEMMA_EPS) for name in NAMES if "Gemma" in name},
    ("Phi-3-mini-128k-instruct", "block_size"): (4096, _LONGROPE),
    ("Phi-4-mini-instruct", "block_size"): (4096, _LONGROPE),
    ("Phi-4-mini-reasoning", "block_size"): (4096, _LONGROPE),
}
"""Where a value is not the published one: (name, field) -> (ours, why)."""

_TIED_PREFIXES = (
    "falcon-", "SmolLM2-", "Llama-3.2-", "Phi-4-mini-", "OLMo-1B-hf", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B",
    "Qwen2.5-Math-1.5B", "Qwen2.5-Coder-0.5B", "Qwen2.5-Coder-1.5B", "Qwen2.5-Coder-3B", "Qwen3-0.6B",
    "Qwen3-1.7B", "Qwen3-4B",
)  # fmt: skip
TIED = {name for name in NAMES if "Gemma" in name or name.startswith(_TIED_PREFIXES)}
"""Models whose config on the hub ties the head to the embedding (by `tie_word_embeddings`, or by its default)."""


def named(name: str, **kwargs) -> Config:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the note on LongRoPE has a test of its own
        return Config.from_name(name, **kwargs)


def old_file(tmp_path: Path, config: Config, **changes) -> Path:
    """A `model_config.yaml` as 0.5.x wrote it: without the fields that came later."""
    values = {key: value for key, value in asdict(config).items() if key not in NEW_FIELDS} | changes
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "model_config.yaml"


# ---- the table


def test_names_are_the_published_ones_in_order_and_unique():
    assert [row["name"] for row in configs] == NAMES
    assert len(NAMES) == len(set(NAMES)) == 210
    assert list(name_to_config) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_named_config_has_the_published_fields(name):
    config, row = named(name), PUBLISHED_BY_NAME[name]
    expected = PUBLISHED["defaults"] | row["fields"] | row["derived"]
    expected["name"], expected["hf_config"] = name, dict(zip(("org", "name"), row["hf"].split("/")))
    for key, value in expected.items():
        if (name, key) in DIFFERENCES:
            ours, reason = DIFFERENCES[name, key]
            assert ours != value and reason
            value = ours
        assert getattr(config, key) == value, key


def test_new_fields_hold_where_the_published_models_need_them():
    for name in NAMES:
        config = named(name)
        assert config.norm_unit_offset == ("Gemma" in name), name
        assert config.norm_affine == (not name.startswith("OLMo-") or name.startswith("OLMo-2")), name
        assert config.tie_embeddings == (name in TIED), name
        assert (config.causal, config.dropout) == (True, 0.0)


def test_fields_are_the_published_ones_followed_by_the_new_ones():
    assert [f.name for f in fields(Config)] == [*PUBLISHED["defaults"], *NEW_FIELDS]
    defaults = {f.name: f.default for f in fields(Config)}
    assert {key: defaults[key] for key in PUBLISHED["defaults"] if key != "hf_config"} == {
        key: value for key, value in PUBLISHED["defaults"].items() if key != "hf_config"
    }


@pytest.mark.parametrize(
    "family, count, first",
    [
        ("stablecode", 4, "stablecode-completion-alpha-3b"), ("pythia", 18, "pythia-14m"), ("falcon", 4, "falcon-7b"),
        ("falcon180b", 2, "falcon-180B"), ("falcon3", 8, "Falcon3-1B-Base"), ("open_LLaMA", 3, "open_llama_3b"),
        ("llama_2", 6, "Llama-2-7b-hf"), ("llama_3", 16, "Llama-3-8B"), ("olmo", 3, "OLMo-1B-hf"),
        ("olmo2", 8, "OLMo-2-1124-7B"), ("gemma", 10, "Gemma-2b"), ("gemma3", 4, "Gemma-3-1b-it"),
        ("codegemma", 1, "CodeGemma-7b-it"), ("freewilly_2", 1, "FreeWilly2"), ("code_llama", 12, "CodeLlama-7b-hf"),
        ("platypus", 8, "Platypus-30B"), ("together_llama2_32k", 1, "LLaMA-2-7B-32K"), ("phi", 10, "phi-1_5"),
        ("mistral", 13, "Mathstral-7B-v0.1"), ("tiny_llama", 2, "tiny-llama-1.1b"),
        ("micro_llama", 1, "micro-llama-300M"),
        ("llama_2_function_calling", 1, "Llama-2-7b-chat-hf-function-calling-v2"), ("qwen_2_5", 14, "Qwen2.5-0.5B"),
        ("qwen_2_5_coder", 12, "Qwen2.5-Coder-0.5B"), ("qwen_2_5_math", 6, "Qwen2.5-Math-1.5B"),
        ("qwen_2_5_1m", 2, "Qwen2.5-7B-Instruct-1M"), ("qwq", 2, "QwQ-32B"), ("qwen_3", 10, "Qwen3-0.6B"),
        ("qwen_3_32b", 1, "Qwen3-32B"), ("qwen_3_moe", 3, "Qwen3-30B-A3B"),
        ("qwen_3_2507_thinking_instruct", 6, "Qwen3-235B-A22B-Thinking-2507"), ("salamandra", 4, "salamandra-2b"),
        ("smollm2", 6, "SmolLM2-135M"), ("r1_distill_llama", 2, "R1-Distill-Llama-8B"),
    ],
)  # fmt: skip
def test_published_family_lists_hold_their_rows(family, count, first):
    rows = getattr(config_module, family)
    assert len(rows) == count and rows[0]["name"] == first
    assert all(name_to_config[row["name"]] == row for row in rows)


def test_rows_share_nothing_that_a_config_could_change():
    named("Gemma-3-4b-it").rope_adjustments["factor"] = 0.5
    named("Gemma-3-4b-it").sliding_window_indices[0] = 0
    named("Llama-3.1-8B").hf_config["org"] = "changed"
    assert named("Gemma-3-4b-it").rope_adjustments == {"factor": 8.0}
    assert named("Gemma-3-4b-it").sliding_window_indices[0] == 1
    assert named("Llama-3.1-8B").hf_config["org"] == "meta-llama"


@pytest.mark.parametrize("name", ["Phi-3-mini-128k-instruct", "Phi-3.5-mini-instruct", "Phi-4-mini-instruct"])
def test_longrope_models_say_that_their_name_is_not_enough(name):
    with pytest.warns(UserWarning, match=r"context of 4,096 tokens instead of 131,072.*LongRoPE"):
        Config.from_name(name)


def test_longrope_factors_bring_the_long_context_without_a_warning():
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "factor": 32.0, "original_max_seq_len": 4096}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = Config.from_name("Phi-3-mini-128k-instruct", rope_adjustments=factors, block_size=131072)
    assert config.block_size == 131072 and rope_kind(config.rope_adjustments) == "longrope"


# ---- names


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Llama-3-8B", "Llama-3-8B"),
        ("Meta-Llama-3-8B", "Llama-3-8B"),
        ("meta-llama/Meta-Llama-3-8B", "Llama-3-8B"),
        ("meta-llama/Llama-3-8B", "Llama-3-8B"),
        ("keeeeenw/MicroLlama", "micro-llama-300M"),
        ("google/gemma-2b", "Gemma-2b"),
    ],
)
def test_model_is_found_by_its_name_here_or_on_the_hub(name, expected):
    assert Config.from_name(name).name == expected


@pytest.mark.parametrize(
    "name, near", [("Lama-3-8B", "Llama-3-8B"), ("google/Gema-2b", "Gemma-2b"), ("other-org/pythia-14m", "pythia-14m")]
)
def test_unknown_name_is_refused_with_the_nearest_ones(name, near):
    with pytest.raises(ValueError, match=f"is not a supported config name; did you mean .*{near}"):
        Config.from_name(name)


def test_keyword_arguments_replace_fields_of_a_named_config():
    config = Config.from_name("pythia-14m", block_size=32, n_layer=2, n_query_groups=2)
    assert (config.block_size, config.n_layer, config.n_query_groups, config.n_embd) == (32, 2, 2, 128)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"n_layr": 2}, "unknown config field 'n_layr'; did you mean n_layer"),
        ({"Block_Size": 2}, "unknown config field 'Block_Size'; did you mean block_size"),
        ({"n_layer": "two"}, "n_layer is 'two'; it must be an integer"),
        ({"n_layer": 2.5}, "n_layer is 2.5; it must be an integer"),
        ({"n_layer": True}, "n_layer is True; it must be an integer"),
        ({"n_layer": None}, "n_layer is None; it must be an integer"),
        ({"bias": "yes"}, "bias is 'yes'; it must be true or false"),
        ({"n_query_groups": [1]}, r"n_query_groups is \[1\]; it must be an integer or null"),
        ({"norm_qk_type": "olmo"}, "norm_qk_type is 'olmo'; choose one of default, olmo2"),
        ({"rope_adjustments": 8.0}, "rope_adjustments is 8.0; it must be a map of keys or null"),
        ({"rope_adjustments": {"facter": 8.0}}, "lacks factor and has unknown 'facter'; did you mean factor"),
        ({"latent_attention": {"kv_lora_rnk": 8}}, "latent_attention lacks .* unknown 'kv_lora_rnk'; .* kv_lora_rank"),
    ],
)
def test_wrong_keys_and_types_are_refused_by_name_and_by_file(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        Config.from_name("pythia-14m", **values)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"n_embd": 64, "n_head": 4} | values))
    with pytest.raises(ValueError, match=message):
        Config.from_file(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("n_embd: 64")
    with pytest.raises(ValueError, match=message):
        Config.from_file(tmp_path / "config.yaml", **values)


# ---- files


@pytest.mark.parametrize("name", NAMES)
def test_saved_config_reads_back_equal(tmp_path, name):
    config = named(name)
    save_config(config, tmp_path)
    again = Config.from_checkpoint(tmp_path)
    assert again == config
    assert again.rope_n_elem == config.rope_n_elem
    assert "model_type" not in (tmp_path / "model_config.yaml").read_text()


def test_saved_config_holds_every_field_in_order(tmp_path):
    save_config(named("pythia-14m"), tmp_path / "new" / "folder")
    saved = yaml.safe_load((tmp_path / "new" / "folder" / "model_config.yaml").read_text())
    assert list(saved) == [f.name for f in fields(Config)]


@pytest.mark.parametrize(
    "name", ["Gemma-2b", "Gemma-2-2b", "Gemma-3-4b-it", "OLMo-1B-hf", "OLMo-2-1124-7B", "pythia-14m"]
)
def test_old_file_is_filled_from_its_name(tmp_path, name):
    config = named(name)
    assert Config.from_file(old_file(tmp_path, config)) == config


def test_old_file_keeps_what_it_says(tmp_path):
    path = old_file(tmp_path, named("Gemma-2b"), norm_eps=1e-5, n_layer=3)
    config = Config.from_file(path)
    assert (config.norm_eps, config.n_layer, config.norm_unit_offset) == (1e-5, 3, True)


@pytest.mark.parametrize(
    "name, offset, affine", [("my-Gemma", True, True), ("my-OLMo", False, False), ("my", False, True)]
)
def test_old_file_with_a_name_outside_the_table_follows_the_old_rule(tmp_path, name, offset, affine):
    norm = "RMSNorm" if "Gemma" in name else "LayerNorm"
    path = old_file(tmp_path, Config(name=name, n_embd=64, n_head=4, norm_class_name=norm))
    config = Config.from_file(path)
    assert (config.norm_unit_offset, config.norm_affine) == (offset, affine)


def test_keyword_config_with_a_published_name_follows_the_old_rule():
    sizes = dict(n_layer=2, n_embd=64, n_head=4, intermediate_size=96)
    gemma = Config(name="Gemma-2b", norm_class_name="RMSNorm", mlp_class_name="GemmaMLP", **sizes)
    assert gemma.norm_unit_offset and gemma.norm_affine
    assert not Config(name="Gemma-2b", norm_unit_offset=False, norm_class_name="RMSNorm", **sizes).norm_unit_offset
    assert not Config(name="OLMo-1B-hf", **sizes).norm_affine
    assert Config(name="OLMo-2-1124-7B", norm_class_name="RMSNorm", **sizes).norm_affine


@pytest.mark.parametrize("name", ["Gemma-2b", "Gemma-3-1b-it", "OLMo-1B-hf", "Llama-3.2-1B"])
def test_renaming_keeps_the_maths(tmp_path, name):
    config = named(name)
    renamed = replace(config, name="x")
    assert asdict(renamed) == asdict(config) | {"name": "x"}
    save_config(renamed, tmp_path)
    assert Config.from_file(tmp_path / "model_config.yaml") == renamed
    llama = replace(named("Llama-3.2-1B"), name="Gemma-and-OLMo")
    assert not llama.norm_unit_offset and llama.norm_affine


def test_short_file_takes_the_rest_from_the_table_or_from_the_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("name: Llama-3.1-8B\nn_layer: 2\n")
    assert Config.from_file(tmp_path / "a.yaml") == named("Llama-3.1-8B", n_layer=2)
    (tmp_path / "b.yaml").write_text("name: mine\nn_layer: 2\n")
    assert Config.from_file(tmp_path / "b.yaml", n_embd=64) == Config(name="mine", n_layer=2, n_embd=64)


def test_numbers_in_a_file_may_be_written_as_people_write_them(tmp_path):
    (tmp_path / "a.yaml").write_text("norm_eps: 1e-6\nrope_base: 1e6\nrotary_percentage: 1\nvocab_size: 50304.0\n")
    config = Config.from_file(tmp_path / "a.yaml")
    assert (config.norm_eps, config.rope_base, config.rotary_percentage, config.vocab_size) == (1e-6, 10**6, 1.0, 50304)
    assert [type(x) for x in (config.norm_eps, config.rope_base, config.vocab_size)] == [float, int, int]


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "just words", "n_layer: [2"])
def test_file_that_is_no_config_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml (holds no model config|is not valid YAML)") as error:
        Config.from_file(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)


def test_file_cannot_run_code(tmp_path):
    (tmp_path / "a.yaml").write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        Config.from_file(tmp_path / "a.yaml")
    assert not (tmp_path / "made").exists()


def test_checkpoint_folder_without_a_file_goes_by_its_name(tmp_path):
    (tmp_path / "pythia-14m").mkdir()
    assert Config.from_checkpoint(tmp_path / "pythia-14m", n_layer=2) == named("pythia-14m", n_layer=2)
    save_config(named("pythia-31m"), tmp_path / "pythia-14m")
    assert Config.from_checkpoint(tmp_path / "pythia-14m").name == "pythia-31m"
    with pytest.raises(FileNotFoundError, match=r"holds no model_config\.yaml"):
        Config.from_checkpoint(tmp_path)


@dataclass
class OwnConfig(Config):
    model_type: ClassVar[str] = "own"

    gate: float = 0.5
    """A field that only this model has."""


def test_registered_subclass_is_saved_and_read_with_its_type(tmp_path):
    config = OwnConfig(n_layer=2, n_embd=64, n_head=4, gate=0.25)
    save_config(config, tmp_path)
    assert (tmp_path / "model_config.yaml").read_text().startswith("model_type: own\n")
    assert OwnConfig.from_checkpoint(tmp_path) == config
    with pytest.raises(ValueError, match="'own' model, not 'gpt'; --extend"):
        Config.from_checkpoint(tmp_path)


def test_subclass_reads_a_plain_checkpoint_and_named_configs(tmp_path):
    save_config(named("pythia-14m"), tmp_path)
    for config in (OwnConfig.from_checkpoint(tmp_path, gate=0.1), OwnConfig.from_name("pythia-14m", gate=0.1)):
        assert type(config) is OwnConfig and (config.n_layer, config.gate) == (6, 0.1)


def test_update_from_run_leaves_a_gpt_alone():
    config = named("pythia-14m")
    assert config.update_from_run(object()) is config


# ---- how fields resolve


def test_sizes_resolve_from_one_another():
    config = Config(n_embd=96, n_head=6, vocab_size=100, padding_multiple=64)
    assert (config.head_size, config.n_query_groups, config.padded_vocab_size) == (16, 6, 128)
    assert (config.intermediate_size, config.rope_n_elem) == (384, 4)
    assert Config(vocab_size=100, padded_vocab_size=64).vocab_size == 64
    assert Config(hf_config={"org": "a", "name": "b"}).name == "b"
    assert Config(n_embd=100, n_head=6, head_size=16).head_size == 16


LATENT = dict(q_lora_rank=8, kv_lora_rank=6, qk_rope_head_dim=4, qk_nope_head_dim=12, v_head_dim=10)


def test_latent_attention_becomes_attributes():
    config = Config(n_embd=64, n_head=4, latent_attention=LATENT)
    assert {key: getattr(config, key) for key in LATENT} == LATENT
    assert (config.qk_head_dim, config.rope_n_elem) == (16, 4)
    without = {key: value for key, value in LATENT.items() if key != "q_lora_rank"}
    assert Config(n_embd=64, n_head=4, latent_attention=without).q_lora_rank is None


def test_layer_flags_resolve_to_one_a_layer():
    sizes = dict(n_layer=3, n_embd=64, n_head=4)
    assert Config(sliding_window_size=8, **sizes).sliding_window_indices == [1, 1, 1]
    assert Config(sliding_window_size=8, sliding_window_indices=[1, 0, 1, 0, 1], **sizes).sliding_window_indices == [
        1,
        0,
        1,
    ]
    assert Config(sliding_window_indices=None, **sizes).sliding_window_indices is None
    assert Config(rope_local_base_freq=10000, **sizes).rope_indices == [1, 1, 1]
    assert Config(rope_local_base_freq=10000, rope_indices=[0, 1, 0], **sizes).rope_indices == [0, 1, 0]


def test_indicator_lists_are_checked():
    assert check_indicator_and_length(None, "x", 3) == [1, 1, 1]
    assert check_indicator_and_length(None, "x", 2, def_val=0) == [0, 0]
    assert check_indicator_and_length([1, 0, 1], "x", 2) == [1, 0]
    with pytest.raises(ValueError, match="x has 3 numbers; it needs one for each of the 2"):
        check_indicator_and_length([1, 0, 1], "x", 2, use_initial_part=False)
    with pytest.raises(ValueError, match="x has 1 numbers"):
        check_indicator_and_length([1], "x", 2)
    with pytest.raises(ValueError, match="x holds 2; only 0 and 1"):
        check_indicator_and_length([1, 2], "x", 2)


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
YARN = dict(factor=40.0, beta_fast=32, beta_slow=1, original_max_seq_len=4096)
LONG = dict(factor=4.0, short_factor=[1.0] * 2, long_factor=[2.0] * 2, original_max_seq_len=64)


@pytest.mark.parametrize(
    "adjustments, kind",
    [
        (None, None),
        ({"factor": 8.0}, "linear"),
        (LLAMA3, "llama3"),
        (YARN, "yarn"),
        (YARN | dict(mscale=1.0, mscale_all_dim=1.0, truncate=False, attention_factor=1.2), "yarn"),
        (LONG, "longrope"),
        (LONG | dict(attention_factor=1.2), "longrope"),
    ],
)
def test_rope_adjustments_are_recognised_by_their_keys(adjustments, kind):
    assert rope_kind(adjustments) == kind
    Config(n_embd=64, n_head=4, rope_adjustments=adjustments)


@pytest.mark.parametrize("whole", [LLAMA3, YARN, LONG])
def test_partial_rope_adjustments_name_the_missing_key(whole):
    for missing in whole:
        with pytest.raises(ValueError, match=rf"rope_adjustments .* lacks .*\b{missing}\b"):
            Config(n_embd=64, n_head=4, rope_adjustments={k: v for k, v in whole.items() if k != missing})


@pytest.mark.parametrize(
    "adjustments, message",
    [
        (LLAMA3 | YARN, "mixes the keys of llama3 and yarn"),
        (YARN | {"low_freq_factor": 1.0}, "mixes the keys of llama3 and yarn"),
        (LLAMA3 | {"mscale": 1.0}, r"\(llama3\) has unknown 'mscale'"),
        ({"factor": 8.0, "original_max_seq_len": 8192}, r"\(linear\) has unknown 'original_max_seq_len'"),
        ({"factor": 0.0}, "factor is 0.0; it must be above 0"),
        (LONG | {"long_factor": [1.0]}, "long_factor has 1 numbers; it needs one a rotated pair: 2"),
        ({}, r"\(linear\) lacks factor"),
    ],
)
def test_wrong_rope_adjustments_are_refused(adjustments, message):
    with pytest.raises(ValueError, match=message):
        Config(n_embd=64, n_head=4, rope_adjustments=adjustments)


MOE = dict(mlp_class_name="LLaMAMoE", n_expert=8, n_expert_per_token=2, intermediate_size=32)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(n_embd=65), "n_embd 65 is no multiple of n_head 4"),
        (dict(n_query_groups=3), "n_query_groups is 3; it must divide n_head 4"),
        (dict(n_query_groups=0), "n_query_groups is 0; it must be at least 1"),
        (dict(n_layer=0), "n_layer is 0; it must be at least 1"),
        (dict(block_size=-1), "block_size is -1; it must be at least 1"),
        (dict(padding_multiple=0), "padding_multiple is 0"),
        (dict(sliding_window_size=0), "sliding_window_size is 0"),
        (dict(norm_unit_offset=True), "norm_unit_offset goes with RMSNorm"),
        (dict(norm_affine=False, norm_class_name="RMSNorm"), "norm_affine: false with LayerNorm"),
        (dict(dropout=1.0), "dropout is 1.0; it must be at least 0 and below 1"),
        (dict(rotary_percentage=1.5), "rotary_percentage is 1.5; it must be between 0 and 1"),
        (dict(mlp_class_name="LLaMAMLP"), "LLaMAMLP needs intermediate_size"),
        (dict(latent_attention=LATENT, n_query_groups=2), "n_query_groups 2 = n_head 4"),
        (dict(sliding_window_size=8, sliding_window_indices=[1]), "sliding_window_indices has 1 numbers"),
        (dict(first_k_dense_replace=1), "first_k_dense_replace needs a class with experts"),
        (MOE | dict(n_expert_per_token=9), "n_expert_per_token is 9; it must be between 1 and n_expert 8"),
        (MOE | dict(n_expert=0), "n_expert_per_token is 2; it must be between 1 and n_expert 0"),
        (MOE | dict(n_expert_groups=3), "n_expert_groups is 3; it must divide n_expert 8"),
        (MOE | dict(n_expert_groups=4, n_topk_groups=5), "n_topk_groups is 5; .* between 1 and 4"),
        (MOE | dict(n_expert_groups=4, n_topk_scores_per_group=3), "n_topk_scores_per_group is 3; .* between 1 and 2"),
    ],
)
def test_impossible_sizes_are_refused_with_value_and_limit(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**{**dict(n_layer=2, n_embd=64, n_head=4), **values})


# ---- family classes


FAMILIES = [
    cls
    for cls in vars(config_module).values()
    if isinstance(cls, type) and issubclass(cls, Config) and cls is not Config
]


@pytest.mark.parametrize("cls", FAMILIES)
def test_family_class_makes_a_small_model_from_two_sizes(cls, tmp_path):
    config = cls(n_layer=2, n_embd=64)
    assert config.head_size == 2 and config.intermediate_size >= 64
    save_config(config, tmp_path)
    assert asdict(Config.from_checkpoint(tmp_path)) == asdict(cls.from_checkpoint(tmp_path)) == asdict(config)


def test_family_classes_are_the_fifteen_promised_ones():
    names = "Llama Mistral Mixtral Phi Gemma Gemma2 Gemma3 Qwen Qwen3 Pythia Falcon OLMo OLMo2 SmolLM2 Deepseek"
    assert [cls.__name__ for cls in FAMILIES] == [f"{name}Config" for name in names.split()]


@pytest.mark.parametrize("cls", [cls for cls in FAMILIES if cls is not DeepseekConfig])  # no named model is of that
@pytest.mark.parametrize("name", ["pythia-14m", "Llama-3.1-8B", "Gemma-2-2b"])
def test_family_class_finds_every_name_as_config_does(cls, name):
    assert asdict(cls.from_name(name)) == asdict(named(name))


def test_family_fields_hold_what_makes_the_family():
    llama = LlamaConfig(n_layer=2, n_embd=64)
    assert (llama.norm_class_name, llama.mlp_class_name, llama.bias, llama.rope_n_elem) == (
        "RMSNorm",
        "LLaMAMLP",
        False,
        2,
    )
    assert LlamaConfig(n_embd=4096).intermediate_size == 11008  # as in the published 7B
    gemma = GemmaConfig(n_layer=2, n_embd=64)
    assert gemma.norm_unit_offset and gemma.tie_embeddings and gemma.scale_embeddings and gemma.norm_eps == 1e-6
    assert Gemma2Config(n_layer=4, n_embd=64).sliding_window_indices == [1, 0, 1, 0]
    gemma3 = Gemma3Config(n_layer=7, n_embd=64)
    assert gemma3.sliding_window_indices == gemma3.rope_indices == [1, 1, 1, 1, 1, 0, 1]
    assert not OLMoConfig(n_layer=2, n_embd=64).norm_affine
    deepseek = DeepseekConfig(n_layer=2, n_embd=64, n_head=4)
    assert (deepseek.qk_nope_head_dim, deepseek.qk_rope_head_dim, deepseek.n_expert_groups) == (16, 8, 4)


# ---- registries and small functions


def test_mlp_and_norm_are_found_by_registered_name(monkeypatch):
    monkeypatch.setattr(config_module._MLPS, "classes", {})
    monkeypatch.setattr(config_module._NORMS, "classes", {})

    @register_mlp
    class PlainMLP: ...

    @register_mlp("named-mlp")
    class OtherMLP: ...

    @register_norm()
    class OwnNorm: ...

    class NormWithOptions:
        def __init__(self, size, eps, add_unit_offset=False, elementwise_affine=True):
            self.said = (size, eps, add_unit_offset, elementwise_affine)

    register_norm(NormWithOptions, "optional")
    sizes = dict(n_layer=2, n_embd=64, n_head=4)
    assert Config(mlp_class_name="PlainMLP", **sizes).mlp_class is PlainMLP
    assert Config(mlp_class_name="named-mlp", **sizes).mlp_class is OtherMLP
    assert Config(norm_class_name="OwnNorm", **sizes).norm_class is OwnNorm
    config = Config(norm_class_name="optional", norm_unit_offset=True, norm_affine=False, **sizes)
    assert config.norm_class(8, eps=0.1).said == (8, 0.1, True, False)
    with pytest.raises(ValueError, match="mlp_class_name is 'GptNeoxMLP'; registered are PlainMLP, named-mlp"):
        _ = Config(**sizes).mlp_class
    with pytest.raises(ValueError, match="norm_class_name is 'RMSNorm'; registered are OwnNorm, optional"):
        _ = Config(norm_class_name="RMSNorm", **sizes).norm_class


def test_registered_name_belongs_to_one_module(monkeypatch):
    monkeypatch.setattr(config_module._MLPS, "classes", {})
    first = type("MLP", (), {"__module__": "one"})
    again = type("MLP", (), {"__module__": "one"})
    other = type("MLP", (), {"__module__": "two"})
    register_mlp(first)
    assert register_mlp(again) is again and config_module._MLPS.get("MLP") is again
    with pytest.raises(ValueError, match=r"two mlp classes claim the name 'MLP': one\.MLP and two\.MLP"):
        register_mlp(other)
    assert config_module._MLPS.get("MLP") is again


def test_find_multiple_rounds_up():
    assert [find_multiple(n, 5) for n in (0, 1, 5, 6)] == [0, 5, 5, 10]


def test_nearest_ignores_case_and_keeps_the_spelling():
    assert nearest("lama", ["LLaMA", "pythia", "Gemma"]) == ["LLaMA"]
    assert nearest("zzz", ["LLaMA", "pythia"]) == []


def test_config_runs_alone_in_an_empty_folder(tmp_path):
    shutil.copy(config_module.__file__, tmp_path / "config.py")
    code = (
        "import sys, config; c = config.Config.from_name('Llama-3.1-8B', n_layer=2); config.save_config(c, '.');"
        "assert config.Config.from_checkpoint('.') == c and config.LlamaConfig(n_layer=2, n_embd=64).n_layer == 2;"
        "print(c.__module__, 'litgpt' in sys.modules, 'torch' in sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.stdout.split() == ["config", "False", "False"], ran.stderr
