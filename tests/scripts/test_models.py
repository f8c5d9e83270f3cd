import json
from dataclasses import replace

import pytest
import torch

from litgpt.config import Config, configs
from litgpt.model import GPT
from litgpt.scripts.models import count_parameters, find_models, setup

LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
SPARSE = dict(mlp_class_name="LLaMAMoE", intermediate_size=48, n_expert=4, n_expert_per_token=2)


def n_built(config: Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(lm_head_bias=True, shared_attention_norm=True),
        dict(bias=False, attn_bias=True, norm_class_name="RMSNorm", n_query_groups=2, norm_qk=True),
        dict(norm_qk=True, norm_qk_type="olmo2", norm_class_name="RMSNorm", parallel_residual=False),
        dict(norm_qk=True, n_query_groups=1),
        dict(norm_affine=False, norm_1=False, post_attention_norm=True, post_mlp_norm=True),
        dict(mlp_class_name="MLP", tie_embeddings=True),
        dict(mlp_class_name="LLaMAMLP", intermediate_size=48, head_size=16),
        dict(**SPARSE, moe_intermediate_size=24, n_shared_expert=2, bias=False),
        dict(**SPARSE, n_expert_groups=2, n_topk_groups=1, first_k_dense_replace=1),
        dict(latent_attention=LATENT, bias=False),
        dict(latent_attention={**LATENT, "q_lora_rank": None}, attn_bias=True),
    ],
)
def test_counted_parameters_are_those_of_the_model(tiny_config, fields):
    config = tiny_config(**fields)
    assert count_parameters(config) == n_built(config)


def test_counted_parameters_are_right_for_a_size_of_each_family():
    seen = set()
    for row in configs:
        family = row["name"].split("-")[0].lower()
        if family in seen:
            continue
        seen.add(family)
        config = Config(**{**row, "n_layer": 2, "sliding_window_indices": None, "rope_indices": None})
        assert count_parameters(config) == n_built(config), row["name"]
    assert len(seen) > 20


def test_every_named_model_has_a_row():
    rows = {row.name: row for row in find_models()}
    assert {row["name"] for row in configs} <= set(rows)
    pythia = rows["pythia-160m"]
    assert (pythia.hf, pythia.context, pythia.parameters) == ("EleutherAI/pythia-160m", 2048, 162_322_944)


def test_table_can_be_filtered(capsys):
    setup("LLAMA-3.2 1b")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "Llama-3.2-1B", "Llama-3.2-1B-Instruct"]
    assert "131,072" in lines[1] and lines[1].endswith("B")


def test_json_is_a_list_of_objects(capsys):
    setup("pythia-14m", json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"name": "pythia-14m", "hf": "EleutherAI/pythia-14m", "context": 512, "parameters": row["parameters"]}
    assert row["parameters"] == n_built(Config.from_name("pythia-14m"))


def test_filter_that_fits_nothing_is_an_error():
    with pytest.raises(ValueError, match="no model has 'xyzzy'"):
        setup("xyzzy")


def test_models_of_extensions_are_listed(monkeypatch):
    from litgpt import registry

    spec = replace(registry.get_model_spec("gpt"), name="mine", sizes={"debug": dict(n_layer=1)})
    monkeypatch.setitem(registry._models, "mine", spec)
    row = next(row for row in find_models() if row.name == "mine/debug")
    assert row.hf == "" and row.parameters is None and row.context == Config().block_size
