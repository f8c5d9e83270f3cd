from types import SimpleNamespace

import pytest
import torch

from litgpt.checkpoint.crc import check_crc
from litgpt.checkpoint.io import load_torch, save_torch
from litgpt.config import save_config
from litgpt.model import GPT
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt.scripts.convert_pretrained_checkpoint import convert_pretrained_checkpoint


@pytest.fixture
def step_dir(tmp_path, tiny_config, tiny_tokenizer_dir):
    folder = tmp_path / "out" / "step-00000010"
    folder.mkdir(parents=True)
    config = tiny_config(tie_embeddings=True)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    weights = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    save_torch({"model": weights, "optimizer": optimizer.state_dict(), "iter_num": 3}, folder / "lit_model.pth")
    save_config(config, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_tokenizer_dir / name).read_bytes())
    (folder / "hyperparameters.yaml").write_text("precision: 32-true\n")
    return folder


@pytest.mark.parametrize("output", ["new", "empty", "below/new"])
def test_weights_come_out_flat_tied_and_at_a_third_of_the_size(tmp_path, step_dir, output, capsys):
    output_dir = tmp_path / output
    if output == "empty":
        output_dir.mkdir()
    convert_pretrained_checkpoint(step_dir, output_dir)
    before, after = load_torch(step_dir / "lit_model.pth")["model"], load_torch(output_dir / "lit_model.pth")
    assert sorted(f"_orig_mod.{name}" for name in after) == sorted(before)
    assert all(torch.equal(tensor, before[f"_orig_mod.{name}"]) for name, tensor in after.items())
    assert after["lm_head.weight"].data_ptr() == after["transformer.wte.weight"].data_ptr()
    sizes = [(folder / "lit_model.pth").stat().st_size for folder in (step_dir, output_dir)]
    assert sizes[1] < 0.45 * sizes[0]
    check_crc(output_dir / "lit_model.pth")
    wanted = {"lit_model.pth", "model_config.yaml", "tokenizer.json", "tokenizer_config.json", "hyperparameters.yaml"}
    assert {path.name for path in output_dir.iterdir()} == wanted
    assert str(output_dir) in capsys.readouterr().out


def test_folder_with_files_is_not_overwritten(tmp_path, step_dir):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(ValueError, match="full holds files already"):
        convert_pretrained_checkpoint(step_dir, tmp_path / "full")
    with pytest.raises(ValueError, match="precious is a file"):
        convert_pretrained_checkpoint(step_dir, tmp_path / "full" / "precious")
    assert (tmp_path / "full" / "precious").read_text() == "x"


def test_folder_above_the_checkpoint_is_explained(tmp_path, step_dir):
    with pytest.raises(FileNotFoundError, match=r"did you mean .*step-00000010"):
        convert_pretrained_checkpoint(step_dir.parent, tmp_path / "new")


def test_full_disk_leaves_no_output_folder(tmp_path, step_dir, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        OSError, match=r"cannot write .*new/lit_model\.pth: No space left .*bytes to write, 1,000 bytes"
    ):
        convert_pretrained_checkpoint(step_dir, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_hugging_face_folder_comes_out_under_our_names(tmp_path, step_dir):
    convert_lit_checkpoint(step_dir, tmp_path / "hf")
    (tmp_path / "hf" / "model_config.yaml").unlink()
    convert_pretrained_checkpoint(tmp_path / "hf", tmp_path / "plain")
    before, after = load_torch(step_dir / "lit_model.pth")["model"], load_torch(tmp_path / "plain" / "lit_model.pth")
    assert after and all(torch.equal(tensor, before[f"_orig_mod.{name}"]) for name, tensor in after.items())
    assert (tmp_path / "plain" / "model_config.yaml").is_file()
