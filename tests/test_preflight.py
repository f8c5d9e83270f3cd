import pytest

from litgpt.args import LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import PythonDocs, TinyLlama
from litgpt.preflight import (
    check_fit,
    check_writable,
    choose_data,
    choose_model,
    init_out_dir,
    open_tokenizer,
    open_tracker,
)
from litgpt.tokenizer import Tokenizer


def test_model_may_be_a_name_fields_or_both():
    assert choose_model("pythia-14m", None, TrainArgs())[1].name == "pythia-14m"
    assert choose_model("pythia-14m", {"n_layer": 1}, TrainArgs())[1].n_layer == 1
    assert choose_model(None, {"n_layer": 1}, TrainArgs())[1] == Config(n_layer=1)
    with pytest.raises(ValueError, match="Name a model"):
        choose_model(None, None, TrainArgs())


def test_config_object_is_copied_before_it_is_changed():
    given = Config(n_layer=1)
    _, config = choose_model(None, given, TrainArgs(tie_embeddings=True))
    assert config.tie_embeddings and not given.tie_embeddings


@pytest.mark.parametrize("asked", [None, False])
def test_tied_model_stays_tied_unless_its_config_says_otherwise(asked):
    _, config = choose_model(None, {"n_layer": 1, "tie_embeddings": True}, TrainArgs(tie_embeddings=asked))
    assert config.tie_embeddings


def test_run_may_change_the_config(tiny_tokenizer_dir):
    class Adapting(Config):
        def update_from_run(self, run):
            self.block_size, self.vocab_size = run.max_seq_length, run.vocab_size
            return self

    train, tokenizer = TrainArgs(max_seq_length=24), Tokenizer(tiny_tokenizer_dir)
    config = choose_model(None, Adapting(n_layer=1), train, tokenizer)[1]
    assert (config.block_size, config.vocab_size) == (24, tokenizer.vocab_size)


def test_default_data_is_taken_where_it_has_been_prepared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--data TextFiles --data.train_data_path DIR.*--data PythonDocs"):
        choose_data(None, None)
    (tmp_path / "data" / "slimpajama" / "train").mkdir(parents=True)
    assert isinstance(choose_data(None, None), TinyLlama)


def test_tokenizer_folder_that_is_missing_is_named(tmp_path, tiny_tokenizer_dir):
    assert open_tokenizer(None) is None
    assert open_tokenizer(tiny_tokenizer_dir).vocab_size == Tokenizer(tiny_tokenizer_dir).vocab_size
    with pytest.raises(FileNotFoundError, match=r"--tokenizer_dir .*nowhere does not exist.*train_tokenizer"):
        open_tokenizer(tmp_path / "nowhere")


def test_text_needs_a_tokenizer_and_tokens_do_not(tiny_tokenizer_dir):
    with pytest.raises(ValueError, match=r"PythonDocs is text.*--tokenizer_dir.*litgpt train_tokenizer"):
        choose_data(PythonDocs(), None)
    assert isinstance(choose_data(PythonDocs(), Tokenizer(tiny_tokenizer_dir)), PythonDocs)
    assert isinstance(choose_data(TinyLlama(), None), TinyLlama)


def test_advice_for_a_vocabulary_that_is_too_small_fits(tiny_tokenizer_dir):
    tokenizer, sizes = Tokenizer(tiny_tokenizer_dir), dict(n_layer=1, n_embd=32, n_head=4)
    with pytest.raises(ValueError) as error:
        check_fit(Config(**sizes, vocab_size=100, padding_multiple=64), TrainArgs(), tokenizer)
    words = str(error.value).replace(".", " ").split()
    numbers = [int(word) for word in words if word.isdigit()]
    advised = Config(**sizes, vocab_size=numbers[-2], padded_vocab_size=numbers[-1])
    check_fit(advised, TrainArgs(), tokenizer)
    check_fit(Config(**sizes, vocab_size=50000), TrainArgs(), tokenizer)


def test_context_above_the_block_size_is_refused():
    with pytest.raises(ValueError, match=r"max_seq_length 64 .*block_size 32"):
        check_fit(Config(n_layer=1, block_size=32), TrainArgs(max_seq_length=64), None)


def test_tracker_that_is_not_installed_is_left_out(tmp_path, monkeypatch):
    def choose_logger(*args, **kwargs):
        raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available.\nlong text")

    monkeypatch.setattr("litgpt.preflight.choose_logger", choose_logger)
    with pytest.warns(UserWarning, match="No tensorboard logs.*Neither") as caught:
        assert open_tracker("tensorboard", tmp_path, "x", TrainArgs(), LogArgs(), False) is None
    assert "\n" not in str(caught[0].message)


def test_artifacts_folder_is_for_relative_paths_only(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_ARTIFACTS_DIR", "artifacts")
    assert str(init_out_dir("out/x")) == "artifacts/out/x" and init_out_dir(tmp_path) == tmp_path
    monkeypatch.delenv("LIGHTNING_ARTIFACTS_DIR")
    assert str(init_out_dir("out/x")) == "out/x"


def test_folder_is_made_and_left_empty_by_the_check(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--out_dir .*file/x"):
        check_writable(tmp_path / "file" / "x")
