import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from litgpt.checkpoint.hf_config import config_from_hf, read_hf_config
from litgpt.checkpoint.io import load_model_weights, save_torch
from litgpt.checkpoint.peft_folder import export_peft, import_peft, is_peft_folder, read_peft
from litgpt.lora import LoRASettings, add_lora, lora_filter, mark_only_lora_as_trainable
from litgpt.model import GPT
from tests.checkpoint.tiny_hf import config_of, save_hf_model

peft = pytest.importorskip("peft")
ALL = dict(key=True, projection=True, mlp=True)
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def load(folder, config):
    model = GPT(config)
    load_model_weights(model, folder)
    return model


def save_base(family, tmp_path):
    """A Hugging Face folder and the config that its config.json says."""
    base = save_hf_model(family, config_of(family), tmp_path / "base").parent
    return base, config_from_hf(read_hf_config(base))


def tuned_run(tmp_path, family, settings):
    """A Hugging Face base folder, a LoRA folder with random updates of it, and the model with both."""
    base, config = save_base(family, tmp_path)
    model = add_lora(load(base, config), settings).eval()
    for name, parameter in model.named_parameters():
        if lora_filter(name, parameter):
            parameter.data = parameter.data + torch.randn_like(parameter) * 0.2
    weights = {name: tensor for name, tensor in model.state_dict().items() if lora_filter(name, tensor)}
    (tmp_path / "run").mkdir()
    save_torch({"model": weights}, tmp_path / "run" / "lit_model.pth.lora")
    return base, tmp_path / "run", config, model


def with_adapter(model, settings, tensors):
    add_lora(model, settings)
    keys = model.load_state_dict(tensors, strict=False)
    assert not keys.unexpected_keys
    assert not [name for name in keys.missing_keys if lora_filter(name, None)]
    return model


IDX = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "targets"), [
    ("llama", ["q_proj", "v_proj"]), ("llama", "all-linear"), ("gpt_neox", ["query_key_value", "dense_h_to_4h"]),
])  # fmt: skip
def test_twenty_steps_lose_what_peft_loses(tmp_path, family, targets, kind):
    base, config = save_base(family, tmp_path)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, **KINDS[kind])
    theirs = peft.get_peft_model(theirs, lora)
    theirs.save_pretrained(tmp_path / "start")
    ours = with_adapter(load(base, config), *read_peft(tmp_path / "start", base, config))
    mark_only_lora_as_trainable(ours)
    losses = {"ours": [], "theirs": []}
    for who, model in (("theirs", theirs), ("ours", ours)):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(20):
            if who == "ours":
                total, n = model(IDX[:, :-1], targets=IDX[:, 1:])
                loss = total / n
            else:
                loss = model(input_ids=IDX, labels=IDX).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[who].append(loss.item())
    assert losses["theirs"][-1] < losses["theirs"][0] - 0.02
    assert losses["ours"] == pytest.approx(losses["theirs"], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "switches"), [
    ("llama", {}), ("llama", ALL), ("llama", {"targets": ["attn.qkv", "fc_1"]}), ("gpt_neox", {}), ("gpt_neox", ALL),
    ("phi3", {"mlp": True}), ("phi3", {"targets": ["h.1.mlp.fc_2"]}), ("falcon", {}), ("deepseek_v3", {"key": True}),
    ("qwen3", {"head": True, "query": False, "value": False}),
])  # fmt: skip
def test_exported_adapter_gives_the_same_logits_in_peft_and_back(tmp_path, family, switches, kind):
    settings = LoRASettings(r=3, alpha=6, dropout=0.0, **switches, **KINDS[kind])
    base, run, config, model = tuned_run(tmp_path, family, settings)
    wanted = model(IDX)
    export_peft(run, base, config, settings, tmp_path / "adapter")
    assert is_peft_folder(tmp_path / "adapter")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = theirs(IDX).logits
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    found = theirs(IDX).logits
    assert (found - before).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    again = with_adapter(load(base, config).eval(), *read_peft(tmp_path / "adapter", base, config))
    torch.testing.assert_close(again(IDX), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_imported_folder_merges_like_one_of_ours(tmp_path):
    settings = LoRASettings(r=3, alpha=6, dropout=0.0, **ALL)
    base, run, config, model = tuned_run(tmp_path, "llama", settings)
    export_peft(run, base, config, settings, tmp_path / "adapter")
    file = import_peft(tmp_path / "adapter", base, config, tmp_path / "imported")
    from litgpt.scripts.merge_lora import load_lora_metadata, merge_lora

    assert LoRASettings.from_flags(load_lora_metadata(file.parent)[0]) == settings
    merge_lora(file.parent)
    torch.testing.assert_close(load(file.parent, config)(IDX), model(IDX), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="not empty"):
        import_peft(tmp_path / "adapter", base, config, tmp_path / "imported")


def test_ranks_and_scales_that_differ_by_layer_are_read(tmp_path):
    base, config = save_base("llama", tmp_path)
    lora = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        rank_pattern={"down_proj": 5}, alpha_pattern={"layers.1.self_attn.q_proj": 16},
    )  # fmt: skip
    from transformers import AutoModelForCausalLM

    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = with_adapter(load(base, config).eval(), *read_peft(tmp_path / "adapter", base, config))
    torch.testing.assert_close(ours(IDX), theirs(IDX).logits, rtol=1e-5, atol=1e-5)


def test_adapter_that_cannot_be_read_is_refused_by_its_reason(tmp_path):
    settings = LoRASettings(r=3, dropout=0.0)
    base, run, config, _ = tuned_run(tmp_path, "llama", settings)
    export_peft(run, base, config, settings, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(file.read_text())
    for change, match in (
        ({"peft_type": "IA3"}, "IA3"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ):  # fmt: skip
        file.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=match):
            read_peft(tmp_path / "adapter", base, config)
    file.write_text(json.dumps(values))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"base_model.model.model.norm.weight": torch.ones(32)}, weights)
    with pytest.raises(ValueError, match=r"model.norm.weight.*no part of a LoRA adapter"):
        read_peft(tmp_path / "adapter", base, config)
    save_file({name.replace("q_proj", "x_proj"): tensor for name, tensor in tensors.items()}, weights)
    with pytest.raises(ValueError, match="x_proj"):
        read_peft(tmp_path / "adapter", base, config)


def test_folder_with_other_files_is_not_replaced(tmp_path):
    settings = LoRASettings(r=3, dropout=0.0)
    base, run, config, _ = tuned_run(tmp_path, "llama", settings)
    export_peft(run, base, config, settings, tmp_path / "adapter")
    export_peft(run, base, config, settings, tmp_path / "adapter")
    with pytest.raises(ValueError, match="something else"):
        export_peft(run, base, config, settings, base)


def test_command_writes_the_adapter_of_a_run(tmp_path, capsys):
    from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint

    settings = LoRASettings(r=3, alpha=6, dropout=0.0, mlp=True)
    base, run, config, _ = tuned_run(tmp_path, "llama", settings)
    (run / "hyperparameters.yaml").write_text(f"checkpoint_dir: {base}\nlora_r: 3\nlora_alpha: 6\nlora_mlp: true\n")
    convert_lit_checkpoint(run, tmp_path / "adapter", format="peft")
    assert str(tmp_path / "adapter" / "adapter_model.safetensors") in capsys.readouterr().out
    export_peft(run, base, config, settings, tmp_path / "other")
    written, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "other"))
    assert written.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in written.items())
    with pytest.raises(FileNotFoundError, match=r"lit_model.pth.lora"):
        convert_lit_checkpoint(base, tmp_path / "again", format="peft")
    with pytest.raises(ValueError, match="dtype"):
        convert_lit_checkpoint(run, tmp_path / "again", format="peft", dtype="bfloat16")
