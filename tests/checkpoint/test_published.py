"""Scripts written for 0.5 that call the functions of `litgpt.utils` about weights."""

import lightning as L
import pytest
import torch

from litgpt import GPT, utils


@pytest.fixture
def saved(tmp_path, tiny_config):
    model = GPT(tiny_config())
    path = tmp_path / "lit_model.pth"
    with utils.incremental_save(path) as saver:
        saver.save({name: saver.store_early(tensor) for name, tensor in model.state_dict().items()})
        with pytest.raises(RuntimeError, match="saved already"):
            saver.save({})
    return model, path


def is_same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_what_incremental_save_wrote_is_loaded_by_load_checkpoint(saved, is_wrapped):
    fabric = L.Fabric(accelerator="cpu", devices=1)
    model = GPT(saved[0].config)
    utils.load_checkpoint(fabric, fabric.setup_module(model) if is_wrapped else model, saved[1])
    assert is_same(model, saved[0])


def test_weights_of_an_adapter_are_laid_over_the_others(saved, tmp_path):
    model, path = saved
    torch.save({"model": {"transformer.ln_f.weight": torch.full((model.config.n_embd,), 7.0)}}, tmp_path / "a.pth")
    other = GPT(model.config)
    utils.load_checkpoint_update(None, tmp_path / "a.pth", other, path)
    assert torch.equal(other.transformer.ln_f.weight, torch.full((model.config.n_embd,), 7.0))
    assert torch.equal(other.transformer.wte.weight, model.transformer.wte.weight)
    torch.save({"nonsense": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth do not fit the model.*nonsense"):
        utils.load_checkpoint_update(None, tmp_path / "a.pth", other, path)


def test_old_names_become_new_ones():
    state = {"m.old": 1, "old": 2, "m.kept": 3}
    assert utils.map_old_state_dict_weights(state, {"old": "new", "gone": "x"}, "m.") is state
    assert state == {"m.new": 1, "old": 2, "m.kept": 3}


def test_large_file_on_a_cpu_gives_a_warning_and_its_size(saved):
    size = saved[1].stat().st_size
    assert utils.check_file_size_on_cpu_and_warn(saved[1], "cpu") == size
    assert utils.check_file_size_on_cpu_and_warn(saved[1], "cuda", size_limit=1) == size
    with pytest.warns(UserWarning, match="will be slow"):
        utils.check_file_size_on_cpu_and_warn(saved[1], torch.device("cpu"), size_limit=1)


def test_folder_that_is_there_is_not_downloaded(saved, tmp_path):
    (tmp_path / "model_config.yaml").write_text("name: tiny\n")
    assert utils.auto_download_checkpoint(tmp_path) == tmp_path
