import pytest

from litgpt.tokenizer import Tokenizer
from litgpt.tokenizer_training import train_tokenizer

TEXT = "The cat sat on the mat. The dog saw the cat and ran to the river.\n\nIt was a warm day, and they were glad.\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is ever written into the real cache folder."""
    monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT * 3], 280, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    """A small byte-level BPE, whose one special token is BOS and EOS."""
    return Tokenizer(tokenizer_folder)
