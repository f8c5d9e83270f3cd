"""Lazy tensors out of lazy tensors: the values, and that nothing is read before its time."""

import pytest
import torch

from litgpt.checkpoint.layouts import dequantize_fp8, join, order_heads, same, unstack_experts
from litgpt.checkpoint.lazy import LazyTensor


def unread(*shape, dtype=torch.float32):
    def fail():
        raise AssertionError("read")

    return LazyTensor(shape, dtype, fail, view=fail)


def in_pieces(tensor):
    return torch.cat([piece.clone() for piece in tensor.iter_pieces()]).view(tensor.shape)


def test_joined_tensors_lie_below_each_other_whole_and_in_pieces():
    parts = [torch.randn(n, 3) for n in (2, 1, 4)]
    joined = join([LazyTensor.of(part) for part in parts])
    assert joined.shape == (7, 3)
    assert torch.equal(joined.read(), torch.cat(parts))
    assert torch.equal(in_pieces(joined), torch.cat(parts))


def test_a_tensor_joined_with_nothing_is_itself():
    tensor = unread(2, 3)
    assert join([tensor]) is tensor


def test_heads_come_out_of_their_groups_and_go_back():
    blocks = dict(zip(["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"], torch.randn(8, 5, 3)))
    grouped = LazyTensor.of(torch.cat([*blocks.values()]))
    ours = order_heads(grouped, n_head=4, n_groups=2, grouped=False)
    assert torch.equal(ours.read(), torch.cat([blocks[n] for n in ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"]]))
    assert torch.equal(order_heads(ours, n_head=4, n_groups=2, grouped=True).read(), grouped.read())
    bias = LazyTensor.of(torch.arange(8.0))
    assert order_heads(bias, n_head=4, n_groups=2, grouped=False).read().tolist() == [0, 1, 4, 5, 2, 6, 3, 7]


def test_heads_of_a_single_group_need_no_sorting():
    tensor = unread(30, 4)
    assert order_heads(tensor, n_head=4, n_groups=1, grouped=False) is tensor


def test_a_tensor_that_must_be_the_same_as_another_is_compared_when_it_is_read():
    values = torch.randn(3, 2)
    assert torch.equal(same(LazyTensor.of(values), LazyTensor.of(values.double()), "no").read(), values)
    with pytest.raises(ValueError, match=r"^they differ$"):
        same(LazyTensor.of(values), LazyTensor.of(values + 1), "they differ").read()
    assert same(unread(3, 2), unread(3, 2), "no").shape == (3, 2)


def test_stacked_experts_come_one_by_one_and_all_else_stays():
    gate_up, down = torch.randn(3, 8, 5), torch.randn(3, 5, 4)
    stacked = {"m.experts.gate_up_proj": LazyTensor.of(gate_up), "m.experts.down_proj.weight": LazyTensor.of(down)}
    others = {"n.experts.0.up_proj.weight": unread(4, 5), "n.mlp.gate_up_proj.weight": unread(8, 5)}
    single = unstack_experts(stacked | others)
    assert {name: single.pop(name) for name in others} == others
    expected = {f"m.experts.{e}.gate_proj.weight": gate_up[e, :4] for e in range(3)}
    expected |= {f"m.experts.{e}.up_proj.weight": gate_up[e, 4:] for e in range(3)}
    expected |= {f"m.experts.{e}.down_proj.weight": down[e] for e in range(3)}
    assert single.keys() == expected.keys()
    assert all(torch.equal(tensor.read(), expected[name]) for name, tensor in single.items())


def test_an_expert_that_is_there_alone_and_in_a_stack_is_refused():
    tensors = {"m.experts.down_proj": unread(2, 5, 4), "m.experts.1.down_proj.weight": unread(5, 4)}
    with pytest.raises(ValueError, match=r"`m.experts.1.down_proj.weight` is there twice.*`m.experts.down_proj`"):
        unstack_experts(tensors)


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (1, 129), (520, 7)])
@pytest.mark.parametrize("piece_bytes", [1 << 25, 1])
def test_fp8_weights_are_multiplied_by_the_scales_of_their_blocks(shape, piece_bytes, monkeypatch):
    monkeypatch.setattr("litgpt.checkpoint.layouts.PIECE_BYTES", piece_bytes)
    quantized = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128))
    expected = torch.empty(shape)
    for i in range(shape[0]):
        for j in range(0, shape[1], 128):
            expected[i, j : j + 128] = quantized[i, j : j + 128].float() * scale[i // 128, j // 128]
    plain = dequantize_fp8({"w": LazyTensor.of(quantized), "w_scale_inv": LazyTensor.of(scale)})
    assert plain.keys() == {"w"}
    assert plain["w"].dtype == plain["w"].read().dtype == torch.bfloat16
    assert torch.equal(plain["w"].read(), expected.bfloat16())
    assert torch.equal(in_pieces(plain["w"]), expected.bfloat16())


def test_fp8_weights_without_scales_or_with_others_are_refused():
    weight = unread(48, 300, dtype=torch.float8_e4m3fn)
    with pytest.raises(
        ValueError, match=r"`w` \(48, 300\) is in FP8.*`w_scale_inv` are missing.*128 x 128, here \(1, 3\)"
    ):
        dequantize_fp8({"w": weight})
    with pytest.raises(ValueError, match=r"are of shape \(48, 1\)"):
        dequantize_fp8({"w": weight, "w_scale_inv": unread(48, 1)})


def test_weights_that_are_not_in_fp8_are_left_alone():
    tensors = {"a": unread(2), "b_scale_inv": unread(1, 1)}
    assert dequantize_fp8(tensors) == tensors
