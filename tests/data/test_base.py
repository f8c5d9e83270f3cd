import os
import subprocess
import sys

import pytest

from litgpt.data.base import DataModule, cache_folder, is_writable, rank_and_world


class Nothing(DataModule):
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None, **kwargs):
        pass

    def train_dataloader(self):
        return []

    def val_dataloader(self):
        return None


def test_a_module_needs_only_connect_and_the_loaders():
    data = Nothing()
    data.prepare_data()
    data.setup()
    assert data.bytes_per_token("train") is None
    with pytest.raises(ValueError, match="Nothing has no raw text"):
        data.texts("train")
    with pytest.raises(TypeError):
        DataModule()


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("LITGPT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "litgpt"


def test_folder_without_write_bit_is_not_writable(tmp_path):
    assert is_writable(tmp_path)
    tmp_path.chmod(0o555)
    assert not is_writable(tmp_path)
    tmp_path.chmod(0o755)


def test_one_process_is_rank_0_of_1():
    assert rank_and_world() == (0, 1)


def test_import_of_the_data_modules_is_light():
    heavy = ["lightning", "transformers", "datasets", "litdata", "pyarrow", "requests", "pydoc_data.topics"]
    code = f"import sys, litgpt.data; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "[]"
