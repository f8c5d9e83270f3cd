import json
import subprocess
import sys
from dataclasses import replace

import pytest

from litgpt import registry
from litgpt.config import Config, configs
from litgpt.scripts.models import features, find_models, setup


def test_every_named_model_has_a_row():
    rows = {row.name: row for row in find_models()}
    assert {row["name"] for row in configs} <= set(rows)
    pythia = rows["pythia-160m"]
    assert (pythia.hf, pythia.context, pythia.parameters) == ("EleutherAI/pythia-160m", 2048, 162_322_944)


def test_active_parameters_are_fewer_where_experts_take_turns():
    rows = {row.name: row for row in find_models()}
    assert rows["Qwen3-30B-A3B"].parameters == 30_532_122_624
    assert rows["Qwen3-30B-A3B"].active_parameters == 3_353_032_704
    assert rows["pythia-160m"].active_parameters == rows["pythia-160m"].parameters


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pythia-160m", ["parallel", "partial-rope"]),
        ("Llama-2-7b-hf", []),
        ("Llama-3.2-1B", ["gqa", "llama3-rope", "tied"]),
        ("falcon-7b", ["mqa", "parallel", "tied"]),
        ("Mixtral-8x7B-v0.1", ["gqa", "moe"]),
        ("Gemma-2-9b", ["gqa", "window", "softcap", "post-norm", "tied"]),
        ("Gemma-3-4b-it", ["gqa", "window", "qk-norm", "post-norm", "local-rope", "linear-rope", "tied"]),
        ("Qwen3-8B", ["gqa", "qk-norm"]),
    ],
)
def test_features_say_what_is_special(name, words):
    assert features(Config.from_name(name)) == words


def test_features_know_latent_attention_and_yarn(tiny_config):
    latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
    yarn = dict(factor=4.0, beta_fast=32, beta_slow=1, original_max_seq_len=16)
    config = tiny_config(latent_attention=latent, rope_adjustments=yarn, parallel_residual=False)
    assert features(config) == ["mla", "yarn"]
    assert features(tiny_config(rotary_percentage=1.0, nope_indices=[0, 1])) == ["parallel", "no-rope"]


def test_table_can_be_filtered(capsys):
    setup("LLAMA-3.2 1b")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "Llama-3.2-1B", "Llama-3.2-1B-Instruct"]
    assert "131,072" in lines[1] and lines[1].endswith("1.24B          gqa llama3-rope tied")


def test_table_can_be_filtered_by_feature(capsys):
    setup("qwen moe qk-norm")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines and all("30.5B   3.35B" in line or "235B   22.2B" in line for line in lines)


def test_json_is_a_list_of_objects(capsys):
    setup("pythia-14m", json=True)
    (row,) = json.loads(capsys.readouterr().out)
    n = 14_067_712
    assert row == {
        "name": "pythia-14m", "hf": "EleutherAI/pythia-14m", "context": 512, "parameters": n, "active_parameters": n,
        "features": ["parallel", "partial-rope"],
    }  # fmt: skip


def test_filter_that_fits_nothing_is_an_error():
    with pytest.raises(ValueError, match="no model has 'xyzzy'"):
        setup("xyzzy")


def test_models_of_extensions_are_listed(monkeypatch):
    spec = replace(registry.get_model_spec("gpt"), name="mine", sizes={"debug": dict(n_layer=1)})
    monkeypatch.setitem(registry._models, "mine", spec)
    row = next(row for row in find_models() if row.name == "mine/debug")
    assert row.hf == "" and row.parameters is None and row.context == Config().block_size


def test_list_needs_no_torch():
    code = "import sys; from litgpt.__main__ import main; main(['models', 'pythia']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
