import pytest
import torch

from litgpt.checkpoint import lazy
from litgpt.checkpoint.lazy import LazyTensor, OpenFile, gather, on_disk


def test_wrapped_tensor_gives_itself_and_copies():
    tensor = torch.randn(3, 4)
    wrapped = LazyTensor.of(tensor)
    assert (wrapped.shape, wrapped.dtype, wrapped.n_bytes) == ((3, 4), torch.float32, 48)
    copy = wrapped.read()
    copy.zero_()
    assert wrapped.view() is not copy and torch.equal(wrapped.view(), tensor) and tensor.any()
    assert wrapped.view().data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("form", ["whole", "transposed", "scalar", "empty"])
def test_pieces_joined_are_the_values_in_any_dtype(form, monkeypatch):
    monkeypatch.setattr(lazy, "PIECE_BYTES", 20)
    tensor = {
        "whole": torch.randn(7, 3), "transposed": torch.randn(7, 3).t(), "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }[form]  # fmt: skip
    wrapped = LazyTensor.of(tensor)
    assert torch.equal(torch.cat(list(wrapped.iter_pieces())) if tensor.numel() else tensor, tensor.reshape(-1)) or (
        form == "empty"
    )
    cast = wrapped.to(torch.bfloat16)
    assert (cast.dtype, cast.view, cast.n_bytes) == (torch.bfloat16, None, tensor.numel() * 2)
    assert torch.equal(cast.read(), tensor.to(torch.bfloat16)) and cast.read().is_contiguous()
    assert wrapped.to(torch.float32) is wrapped


def test_cast_of_a_computed_tensor_is_computed_once():
    calls = []

    def read():
        calls.append(1)
        return torch.ones(2, 2)

    computed = LazyTensor((2, 2), torch.float32, read).to(torch.float16)
    assert computed.pieces is None and not calls
    assert torch.equal(computed.read(), torch.ones(2, 2, dtype=torch.float16)) and calls == [1]


def test_pieces_of_large_tensors_are_bounded(monkeypatch):
    monkeypatch.setattr(lazy, "PIECE_BYTES", 64)
    sizes = [piece.numel() * 4 for piece in LazyTensor.of(torch.randn(100)).iter_pieces()]
    assert max(sizes) == 64 and sum(sizes) == 400


def test_tensor_on_disk_is_read_cut_and_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "PIECE_BYTES", 20)
    values = torch.arange(24, dtype=torch.int16).view(6, 4)
    (tmp_path / "x").write_bytes(b"head" + values.numpy().tobytes() + b"tail")
    tensor = on_disk(OpenFile(tmp_path / "x"), (6, 4), torch.int16, 4, view=None)
    assert torch.equal(tensor.read(), values)
    assert torch.equal(torch.cat([piece.clone() for piece in tensor.iter_pieces()]), values.view(-1))
    part = tensor.span(4, (2, 4)).span(2, (3,))
    assert torch.equal(part.read(), values.view(-1)[6:9]) and part.view is None
    (tmp_path / "x").write_bytes(b"head")
    with pytest.raises(ValueError, match="x is cut off or damaged"):
        tensor.read()


def test_tensor_on_disk_stays_that_of_the_file_that_was_opened(tmp_path):
    for name, value in (("x", 1.0), ("y", 2.0)):
        (tmp_path / name).write_bytes(torch.full((4,), value).numpy().tobytes())
    tensor = on_disk(OpenFile(tmp_path / "x"), (4,), torch.float32, 0, view=None)
    (tmp_path / "y").replace(tmp_path / "x")
    assert (tensor.read() == 1).all()


def test_gathering_too_little_is_a_bug():
    with pytest.raises(AssertionError):
        gather(iter([torch.ones(3)]), (2, 2), torch.float32)
