"""The tables against what transformers writes: names and shapes of all named configs and of each model type."""

import warnings

import pytest
import torch
from tiny_hf import FAMILIES, SIZES, config_of, save_hf_model

from litgpt.checkpoint.adapter import StateDictAdapter, find_model_type, is_hf_names, lit_shapes
from litgpt.checkpoint.tensors import LazyTensor, open_weights
from litgpt.checkpoint.weight_maps import WEIGHT_MAPS
from litgpt.config import Config, name_to_config
from litgpt.model import GPT


def named(name, **overrides):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LongRoPE
        return Config.from_name(name, **overrides)


def shrink(name):
    """The named config with the same structure and tiny sizes."""
    full = named(name)
    groups = {1: 1, full.n_head: 4}.get(full.n_query_groups, 2)
    sizes = SIZES | dict(n_query_groups=groups, head_size=8 if full.head_size * full.n_head == full.n_embd else 16)
    sizes |= dict(intermediate_size=128 if full.mlp_class_name == "GptNeoxMLP" else 48, rope_adjustments=None)
    if full.n_expert:
        sizes |= dict(
            n_expert=4, n_expert_per_token=2, moe_intermediate_size=24 if full.moe_intermediate_size else None
        )
    return named(name, **sizes)


def structures():
    """One name for each structure that the 210 named configs have."""
    found = {}
    for name in name_to_config:
        config = shrink(name)
        shape = (find_model_type(config), *lit_shapes(config).items(), config.tie_embeddings)
        found.setdefault(shape, name)
    return list(found.values())


def test_every_named_config_has_a_model_type_of_its_family():
    expected = {
        "pythia-160m": "gpt_neox", "stablelm-base-alpha-3b": "gpt_neox", "stablecode-completion-alpha-3b": "gpt_neox",
        "stablelm-3b-4e1t": "stablelm", "stable-code-3b": "stablelm", "falcon-7b": "falcon", "falcon-180B": "falcon",
        "Falcon3-1B-Base": "llama", "Llama-2-7b-hf": "llama", "Llama-3.1-405B": "llama", "OLMo-1B-hf": "olmo",
        "OLMo-2-1124-7B": "olmo2", "Gemma-2b": "gemma", "CodeGemma-7b-it": "gemma", "Gemma-2-27b-it": "gemma2",
        "Gemma-3-1b-it": "gemma3_text", "phi-1_5": "phi", "phi-2": "phi", "Phi-3-mini-4k-instruct": "phi3",
        "Phi-3.5-mini-instruct": "phi3", "phi-4": "phi3", "Phi-4-mini-instruct": "phi3", "Mistral-7B-v0.3": "mistral",
        "Mistral-Large-Instruct-2411": "mistral", "Mathstral-7B-v0.1": "mistral", "Mixtral-8x22B-v0.1": "mixtral",
        "Qwen2.5-7B": "qwen2", "QwQ-32B": "qwen2", "Qwen3-0.6B": "qwen3", "Qwen3-30B-A3B": "qwen3_moe",
        "SmolLM2-135M": "llama", "salamandra-2b": "llama", "R1-Distill-Llama-8B": "llama", "FreeWilly2": "llama",
    }  # fmt: skip
    assert {name: find_model_type(named(name)) for name in expected} == expected
    assert {find_model_type(named(name)) for name in name_to_config} == {*expected.values()}


@pytest.mark.parametrize("name", structures())
def test_names_and_shapes_of_a_named_config_are_those_that_transformers_writes(name, tmp_path):
    config = shrink(name)
    model_type = find_model_type(named(name))
    written = open_weights(save_hf_model(model_type, config, tmp_path))
    assert StateDictAdapter(config, model_type).hf_shapes() == {n: tensor.shape for n, tensor in written.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_of_a_model_type_are_those_that_transformers_writes(family, tmp_path):
    config, model_type = config_of(family), family.split(",")[0]
    written = open_weights(save_hf_model(model_type, config, tmp_path))
    assert StateDictAdapter(config, model_type).hf_shapes() == {n: tensor.shape for n, tensor in written.items()}
    assert is_hf_names(written) and not is_hf_names(lit_shapes(config))


def check_full_size(config):
    """Names go to Hugging Face and back without loss, and so does every shape."""

    def unread():
        raise AssertionError("a weight was read")

    adapter = StateDictAdapter(config)
    wanted = {n: s for n, s in lit_shapes(config).items() if n != "lm_head.weight" or not config.tie_embeddings}
    there = adapter.to_hf({n: LazyTensor(s, torch.bfloat16, unread) for n, s in wanted.items()})
    assert {n: tensor.shape for n, tensor in there.items()} == adapter.hf_shapes()
    assert sum(tensor.n_bytes for tensor in there.values()) == sum(2 * torch.Size(s).numel() for s in wanted.values())
    back = adapter.from_hf(there)
    assert {n: tensor.shape for n, tensor in back.items()} == wanted
    return sum(tensor.n_bytes // 2 for tensor in back.values())


@pytest.mark.parametrize("part", range(7))
def test_no_name_of_a_full_sized_config_is_lost_or_left_over(part):
    for name in [*name_to_config][part::7]:
        check_full_size(named(name))


@pytest.mark.parametrize(
    "name, n_parameters",
    {
        "pythia-1b": 1_011_781_632, "phi-2": 2_779_683_840, "Gemma-2b": 2_506_172_416, "Llama-2-7b-hf": 6_738_415_616,
        "Mistral-7B-v0.1": 7_241_732_096, "falcon-7b": 6_921_720_704, "Llama-3.1-405B": 405_853_388_800,
        "Mixtral-8x7B-v0.1": 46_702_792_704, "Qwen3-30B-A3B": 30_532_122_624,
    }.items(),
)  # fmt: skip
def test_a_full_sized_file_has_as_many_numbers_as_the_published_one(name, n_parameters):
    assert check_full_size(named(name)) == n_parameters


def test_lit_shapes_are_those_of_the_whole_model():
    for name in name_to_config:
        config = named(name)
        if 3 * config.n_layer * config.n_expert > 2000:
            config = named(name, n_layer=3)
        with torch.device("meta"):
            state = GPT(config).state_dict()
        assert lit_shapes(config) == {n: tuple(tensor.shape) for n, tensor in state.items()}, name


def test_lit_shapes_know_that_the_first_layers_of_a_mixture_may_be_dense():
    for n_dense in (1, 2, 3, 5):
        config = config_of("deepseek_v3", n_layer=4, first_k_dense_replace=n_dense)
        assert lit_shapes(config) == {n: tuple(tensor.shape) for n, tensor in GPT(config).state_dict().items()}


def test_a_model_type_is_found_by_fields_where_the_name_says_nothing():
    for family in FAMILIES:
        model_type = family.split(",")[0]
        assert find_model_type(config_of(family, name="mine")) == model_type


def test_a_model_type_in_config_json_wins():
    config = config_of("llama")
    assert find_model_type(config, {"model_type": "mistral"}) == "mistral"
    assert (
        find_model_type(config, {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}) == "gemma3_text"
    )
    assert find_model_type(config, {"model_type": "mistral3", "text_config": {"model_type": "mistral"}}) == "mistral"
    assert find_model_type(config, {"model_type": "RefinedWebModel"}) == "falcon"
    with pytest.raises(ValueError, match=r"'qwen3_next'.*nearest.*: qwen3"):
        find_model_type(config, {"model_type": "qwen3_next"})


def test_tensor_names_decide_between_types_that_the_config_does_not_tell_apart():
    llama, phi = (list(StateDictAdapter(config_of("llama"), kind).hf_shapes()) for kind in ("llama", "phi3"))
    assert find_model_type(config_of("llama"), None, phi) == "phi3"
    assert find_model_type(config_of("llama"), None, llama) == "llama"
    assert find_model_type(named("phi-4"), None, phi) == "phi3"
    assert find_model_type(named("phi-4"), None, llama) == "llama"  # some publish it with Llama's names
    assert find_model_type(named("phi-4"), None, lit_shapes(config_of("llama"))) == "phi3"


def test_names_are_told_apart_from_ours_also_inside_a_larger_model():
    assert is_hf_names(["language_model.model.layers.0.mlp.up_proj.weight"])
    assert is_hf_names(["model.language_model.layers.0.mlp.up_proj.weight"])
    assert is_hf_names(["model.layers.3.self_attn.q_proj.weight_scale_inv"])
    assert not is_hf_names(["lm_head.weight", "transformer.ln_f.weight", "transformer.h.0.attn.attn.weight"])
    assert not is_hf_names(["transformer.h.0.attn.qkv.lora_A", "backbone.layers.0.mixer.A_log"])
    assert not is_hf_names([])


def test_a_type_without_a_place_for_a_part_is_refused():
    with pytest.raises(ValueError, match=r"a llama file has no place for `transformer.h.0.attn.norm_q.weight`.*qwen3"):
        StateDictAdapter(config_of("qwen3"), "llama")
    with pytest.raises(ValueError, match="'lama'; the nearest that has one: llama"):
        StateDictAdapter(config_of("llama"), "lama")


def test_a_table_of_ones_own_can_be_used():
    config, table = config_of("llama"), WEIGHT_MAPS["glm4"]
    shapes = StateDictAdapter(config, table).hf_shapes()
    assert shapes["model.layers.1.mlp.gate_up_proj.weight"] == (96, 32)


def test_every_table_is_compared_with_transformers():
    assert {family.split(",")[0] for family in FAMILIES} == WEIGHT_MAPS.keys()
