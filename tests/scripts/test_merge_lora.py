import pytest
import torch
import yaml

from litgpt.checkpoint.io import load_torch, save_torch
from litgpt.checkpoint.loading import load_model_weights
from litgpt.config import save_config
from litgpt.lora import LoRASettings, add_lora, lora_filter
from litgpt.model import GPT
from litgpt.scripts.merge_lora import load_lora_metadata, merge_lora

FLAGS = {
    "lora_r": 3,
    "lora_alpha": 6,
    "lora_dropout": 0.0,
    "lora_key": False,
    "lora_mlp": True,
    "lora_projection": True,
}


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if lora_filter(name, parameter):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3


def write_run(tmp_path, config, flags=FLAGS, dtype=torch.float32, seed=0):
    """A base model, a LoRA folder of it, and what the finetuned model computes."""
    base, folder = tmp_path / "base", tmp_path / "out" / "final"
    base.mkdir(exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    model = GPT(config).to(dtype)
    save_torch(model.state_dict(), base / "lit_model.pth")
    add_lora(model, LoRASettings.from_flags(flags))
    randomize(model, seed)
    weights = {name: tensor for name, tensor in model.state_dict().items() if lora_filter(name, tensor)}
    save_torch({"model": weights}, folder / "lit_model.pth.lora")
    for where in (base, folder):
        save_config(config, where)
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({"checkpoint_dir": str(base), **flags}))
    return base, folder, model.eval()


def logits(model, config, seed=5):
    idx = torch.randint(0, config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(seed))
    return model(idx)


def load(folder, config):
    model = GPT(config)
    load_model_weights(model, folder)
    return model.eval()


@pytest.mark.parametrize("flags", [{}, {"lora_dora": True}, {"lora_rslora": True}, {"lora_targets": ["qkv", "fc"]}])
def test_merged_checkpoint_computes_what_the_finetuned_model_did(tmp_path, tiny_config, flags, capsys):
    config = tiny_config(n_query_groups=2)
    _, folder, model = write_run(tmp_path, config, FLAGS | flags)
    merge_lora(folder)
    weights = load_torch(folder / "lit_model.pth")
    assert weights.keys() == GPT(config).state_dict().keys()
    torch.testing.assert_close(logits(load(folder, config), config), logits(model, config), rtol=1e-5, atol=1e-5)
    assert str(folder / "lit_model.pth") in capsys.readouterr().out


def test_second_run_into_the_same_folder_replaces_the_merged_model(tmp_path, tiny_config, capsys):
    config = tiny_config()
    write_run(tmp_path, config)
    merge_lora(tmp_path / "out" / "final")
    _, folder, model = write_run(tmp_path, config, seed=1)
    merge_lora(folder)
    torch.testing.assert_close(logits(load(folder, config), config), logits(model, config), rtol=1e-5, atol=1e-5)
    before = (folder / "lit_model.pth").stat().st_mtime_ns
    capsys.readouterr()
    merge_lora(folder)
    assert "already" in capsys.readouterr().out
    assert (folder / "lit_model.pth").stat().st_mtime_ns == before


def test_model_that_no_merge_has_written_is_left_alone(tmp_path, tiny_config):
    base, folder, _ = write_run(tmp_path, tiny_config())
    (folder / "lit_model.pth").write_bytes((base / "lit_model.pth").read_bytes())
    with pytest.raises(ValueError, match="move it away"):
        merge_lora(folder)
    (folder / "lit_model.pth").unlink()
    merge_lora(folder)
    (folder / "lit_model.pth").write_bytes((base / "lit_model.pth").read_bytes())  # put there by hand later
    with pytest.raises(ValueError, match="move it away"):
        merge_lora(folder)
    assert (folder / "lit_model.pth").read_bytes() == (base / "lit_model.pth").read_bytes()


def test_kill_while_the_merged_model_is_recorded_leaves_a_usable_folder(tmp_path, tiny_config, monkeypatch, capsys):
    from litgpt.checkpoint import lora_merge

    _, folder, _ = write_run(tmp_path, tiny_config())
    real, calls = lora_merge._write_record, []

    def die_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(lora_merge, "_write_record", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            merge_lora(folder)
    merge_lora(folder)
    assert "already" in capsys.readouterr().out


def test_tied_head_with_an_update_becomes_a_weight_of_its_own(tmp_path, tiny_config):
    config = tiny_config(tie_embeddings=True)
    _, folder, model = write_run(tmp_path, config, FLAGS | {"lora_head": True})
    merge_lora(folder)
    merged = type(config).from_checkpoint(folder)
    assert not merged.tie_embeddings
    torch.testing.assert_close(logits(load(folder, merged), merged), logits(model, config), rtol=1e-5, atol=1e-5)


def test_precision_decides_the_dtype(tmp_path, tiny_config):
    _, folder, _ = write_run(tmp_path, tiny_config(), dtype=torch.bfloat16)
    merge_lora(folder)
    assert {tensor.dtype for tensor in load_torch(folder / "lit_model.pth").values()} == {torch.bfloat16}
    merge_lora(folder, precision="32-true")
    assert {tensor.dtype for tensor in load_torch(folder / "lit_model.pth").values()} == {torch.float32}
    with pytest.raises(ValueError, match="fp7"):
        merge_lora(folder, precision="fp7")


def test_base_may_be_a_hugging_face_folder(tmp_path, tiny_config):
    from litgpt.checkpoint.export import open_export, write_hf_folder

    config = tiny_config(
        bias=False, mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", intermediate_size=48, parallel_residual=False,
        rotary_percentage=1.0,
    )  # fmt: skip
    base, folder, model = write_run(tmp_path, config)
    write_hf_folder(open_export(base, config), tmp_path / "hf", 10**9)
    (tmp_path / "hf" / "model_config.yaml").unlink()
    merge_lora(folder, tmp_path / "hf")
    torch.testing.assert_close(logits(load(folder, config), config), logits(model, config), rtol=1e-5, atol=1e-5)


def test_metadata_is_read_as_published(tmp_path, tiny_config):
    base, folder, _ = write_run(tmp_path, tiny_config(), FLAGS | {"precision": "bf16-mixed"})
    lora, found, precision = load_lora_metadata(folder)
    assert (lora, found, precision) == (FLAGS, base, "bf16-mixed")


def test_what_is_missing_or_does_not_fit_is_named(tmp_path, tiny_config):
    base, folder, _ = write_run(tmp_path, tiny_config())
    values = yaml.safe_load((folder / "hyperparameters.yaml").read_text())
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(values | {"lora_key": True}))
    with pytest.raises(ValueError, match=r"attn.qkv.*lora_A \(6, 32\).*settings \(r 3\)"):
        merge_lora(folder)
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(FileNotFoundError, match="pretrained_checkpoint_dir"):
        merge_lora(folder, tmp_path / "nowhere")
    data = bytearray((folder / "lit_model.pth.lora").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "lit_model.pth.lora").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        merge_lora(folder)
    assert not (folder / "lit_model.pth").exists()
    (folder / "hyperparameters.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="hyperparameters"):
        merge_lora(folder)
    with pytest.raises(FileNotFoundError, match=r"lit_model.pth.lora"):
        merge_lora(base)
