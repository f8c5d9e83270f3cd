import pytest
import torch

from litgpt.checkpoint.folders import (
    check_valid_checkpoint_dir,
    copy_config_files,
    extend_checkpoint_dir,
    find_resume_path,
    find_weights_file,
)


def checkpoint(folder, name="lit_model.pth"):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {}}, folder / name)
    return folder / name


def test_resume_takes_the_newest_step_by_number(tmp_path):
    assert find_resume_path(False, tmp_path) is None
    checkpoint(tmp_path / "step-999999")
    newest = checkpoint(tmp_path / "step-1000000")
    checkpoint(tmp_path / "final")
    checkpoint(tmp_path / ".step-00000300.tmp-1")
    checkpoint(tmp_path / "step-last")
    for resume in (True, "auto", tmp_path):
        assert find_resume_path(resume, tmp_path) == newest
    assert find_resume_path(tmp_path / "final", tmp_path) == tmp_path / "final" / "lit_model.pth"
    assert find_resume_path(newest, tmp_path) == newest


def test_resume_passes_over_folders_without_a_whole_file(tmp_path):
    whole = checkpoint(tmp_path / "step-1")
    cut = checkpoint(tmp_path / "step-2")
    cut.write_bytes(cut.read_bytes()[:-5])
    (tmp_path / "step-3").mkdir()
    with pytest.warns(UserWarning, match=r"step-2.* is cut off"):
        assert find_resume_path(True, tmp_path) == whole
    with pytest.raises(ValueError, match=r"cannot resume from .*step-2.*cut off"):
        find_resume_path(cut, tmp_path)


def test_resume_with_nothing_there_says_so(tmp_path):
    assert find_resume_path("auto", tmp_path) is None
    assert find_resume_path("auto", tmp_path / "none") is None
    with pytest.raises(FileNotFoundError, match=r"nothing to resume from.*--resume auto"):
        find_resume_path(True, tmp_path)
    for given in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"nothing to resume from: .* or lit_model\.pth"):
            find_resume_path(given, tmp_path)


def test_weights_file_prefers_ours_then_index_then_single(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        find_weights_file(tmp_path)
    order = ["model-1.safetensors", "model.safetensors", "model.safetensors.index.json", "lit_model.pth"]
    for name in order:
        (tmp_path / name).write_text("")
        assert find_weights_file(tmp_path).name == name
    (tmp_path / "lit_model.pth").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model-2.safetensors").write_text("")
    with pytest.raises(FileNotFoundError, match="index of several"):
        find_weights_file(tmp_path)


def test_config_files_are_copied_where_they_exist(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir(), target.mkdir()
    for name in ("model_config.yaml", "tokenizer.json", "lit_model.pth"):
        (source / name).write_text(name)
    copy_config_files(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["model_config.yaml", "tokenizer.json"]
    copy_config_files(source, source)


def test_folder_of_a_run_points_to_its_checkpoint(tmp_path):
    for name in ("step-2", "step-10", "final"):
        checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*final\?"):
        check_valid_checkpoint_dir(tmp_path, raise_error=True)
    (tmp_path / "final" / "lit_model.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"did you mean .*step-10\?"):
        check_valid_checkpoint_dir(tmp_path, raise_error=True)


def test_relative_name_is_looked_up_below_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "org" / "name").mkdir(parents=True)
    paths = {"org/name": "checkpoints/org/name", "org/none": "org/none", "checkpoints/x": "checkpoints/x"}
    for given, expected in paths.items():
        assert str(extend_checkpoint_dir(type(tmp_path)(given))) == expected
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert str(extend_checkpoint_dir(type(tmp_path)("org/name"))) == "org/name"


def test_invalid_checkpoint_folder_is_explained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints" / "org" / "name"
    with pytest.raises(SystemExit) as stopped:
        check_valid_checkpoint_dir(folder)
    assert stopped.value.code == 1 and "litgpt download" in capsys.readouterr().err
    checkpoint(folder)
    (folder / "model_config.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match=r"lacks tokenizer\.json or tokenizer\.model, .*checkpoints/org/name"):
        check_valid_checkpoint_dir(folder, raise_error=True)
    check_valid_checkpoint_dir(folder, ignore_tokenizer_files=True)
    with pytest.raises(SystemExit):
        check_valid_checkpoint_dir(folder, verbose=False)
    assert capsys.readouterr().err == ""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_text("")
    check_valid_checkpoint_dir(folder)
    with pytest.raises(FileNotFoundError, match=r"lit_model\.pth\.lora"):
        check_valid_checkpoint_dir(folder, model_filename="lit_model.pth.lora", raise_error=True)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_hugging_face_folder_is_a_valid_checkpoint(tmp_path, weights):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", weights):
        (tmp_path / name).write_text("{}")
    check_valid_checkpoint_dir(tmp_path, raise_error=True)
    assert find_weights_file(tmp_path).name == weights
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"it lacks model_config\.yaml"):
        check_valid_checkpoint_dir(tmp_path, raise_error=True)


def test_litgpt_weights_can_be_passed_over(tmp_path):
    for name in ("lit_model.pth", "model.safetensors"):
        (tmp_path / name).write_text("")
    assert find_weights_file(tmp_path).name == "lit_model.pth"
    assert find_weights_file(tmp_path, but="lit_model.pth").name == "model.safetensors"
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected \*\.safetensors or"):
        find_weights_file(tmp_path, but="lit_model.pth")
