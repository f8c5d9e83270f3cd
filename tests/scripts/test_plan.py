import json
import subprocess
import sys

import pytest

from litgpt import Config
from litgpt.__main__ import main
from litgpt.config import save_config
from litgpt.scripts import plan
from litgpt.scripts.plan import find_model, setup

EXTENSION = """
from dataclasses import dataclass
from torch import nn
from litgpt import Config, GPT, register_model

class Wider(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.more = nn.Linear(10, 100, bias=False)

@dataclass
class WiderConfig(Config):
    pass

register_model("wider", model=Wider, config=WiderConfig, sizes={"debug": dict(n_layer=1, n_embd=32, n_head=4)})
"""
HF_LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=320, hidden_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, rms_norm_eps=1e-5,
    rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
)  # fmt: skip


def planned(capsys, *args, **kwargs) -> dict:
    setup(*args, json=True, **kwargs)
    return json.loads(capsys.readouterr().out)


def test_table_says_what_fits_and_what_would_help(capsys):
    setup("Llama-3.1-8B", memory=24)
    out = capsys.readouterr().out
    assert "8.03 B parameters, 32 layers, context 131,072" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.endswith((" yes", " no"))}
    assert {task: line.split()[-1] for task, line in rows.items()} == {
        "pretrain": "no", "full": "no", "lora": "no", "qlora": "yes", "generate": "yes"
    }  # fmt: skip
    helps = out.partition("What saves most")[2].splitlines()[1:]
    assert len(helps) == 9  # three for each that does not fit
    assert any("lora" in line and "fits  --quantize bnb.nf4 (QLoRA)" in line for line in helps)


def test_mixture_of_experts_tells_active_parameters(capsys):
    setup("Mixtral-8x7B-v0.1", task="generate")
    assert "46.7 B parameters, 12.9 B for each token" in capsys.readouterr().out


def test_json_has_bytes_and_adds_up(capsys):
    found = planned(capsys, "pythia-160m", batch_size=2, seq_length=512, memory=1, device="cpu")
    assert found["parameters"] == found["active_parameters"] == 162_322_944
    assert found["training_flops_per_token"] == 3 * found["inference_flops_per_token"]
    assert set(found["runs"]) == {"pretrain", "full", "lora", "qlora", "generate"}
    parts = ("weights", "gradients", "optimizer", "activations", "kv_cache", "cuda_context")
    for run in found["runs"].values():
        assert run["total"] == sum(run[part] for part in parts)
        assert run["fits"] == (run["total"] <= 10**9)
    assert found["runs"]["pretrain"]["weights"] == 4 * 162_322_944
    assert found["runs"]["generate"]["kv_cache"] == 2 * 512 * 12 * 2 * 768 * 2


def test_settings_reach_the_plan(capsys):
    plain = planned(capsys, "pythia-160m", task="lora")["runs"]["lora"]
    more = planned(capsys, "pythia-160m", task="lora", lora_r=16, lora_mlp=True)["runs"]["lora"]
    assert more["trained_parameters"] > 2 * plain["trained_parameters"]
    packed = planned(capsys, "pythia-160m", task="generate", quantize="bnb.nf4")["runs"]["generate"]
    assert packed["weights"] < planned(capsys, "pythia-160m", task="generate")["runs"]["generate"]["weights"]


def test_memory_is_that_of_the_gpu_or_24(capsys, monkeypatch):
    for found, expected in ((None, 24 * 10**9), (80 * 2**30, 80 * 2**30)):
        monkeypatch.setattr(plan, "gpu_memory_bytes", lambda found=found: found)
        assert planned(capsys, "pythia-14m", task="lora")["memory"] == expected


def test_folder_of_ours_is_read(tmp_path, tiny_config, capsys):
    save_config(tiny_config(), tmp_path)
    assert find_model(str(tmp_path)) == (tiny_config(), None)
    assert planned(capsys, str(tmp_path))["model"] == "tiny"


def test_folder_of_hugging_face_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF_LLAMA))
    config, n = find_model(str(tmp_path))
    assert (config.n_embd, config.n_query_groups, config.tie_embeddings, n) == (32, 2, True, None)


def test_name_on_the_hub_is_known():
    assert find_model("EleutherAI/pythia-14m")[0] == Config.from_name("pythia-14m")


def test_own_model_is_counted_by_building_it(tmp_path, capsys):
    extension = tmp_path / "wider_model_of_plan_test.py"
    extension.write_text(EXTENSION)
    main(["plan", "wider/debug", "--extend", str(extension), "--json", "true", "--task", "full"])
    found = json.loads(capsys.readouterr().out)
    assert not found["is_exact"]
    main(["plan", "wider/debug", "--extend", str(extension)])
    assert "A model of your own" in capsys.readouterr().out
    from litgpt.plan import count_parameters

    assert found["parameters"] == count_parameters(Config(n_layer=1, n_embd=32, n_head=4)).total + 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "Unknown model 'nowhere'"),
        (["pythia-14m", "--memory", "0"], "--memory is 0.0; it must be above 0"),
        (["pythia-14m", "--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["pythia-14m", "--seq_length", "513"], "--seq_length is 513; the context of pythia-14m has 512 tokens"),
        (["pythia-14m", "--optimizer", "Adamm"], "did you mean Adam"),
    ],
)
def test_bad_value_is_one_line_and_exit_1(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        main(["plan", *flags])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (1, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("where", ["name", "ours", "hugging face"])
def test_plan_needs_no_torch(tmp_path, tiny_config, where):
    model = "Mixtral-8x7B-v0.1" if where == "name" else str(tmp_path)
    if where == "ours":
        save_config(tiny_config(), tmp_path)
    else:
        (tmp_path / "config.json").write_text(json.dumps(HF_LLAMA))
    code = f"import sys; from litgpt.__main__ import main; main(['plan', {model!r}]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
