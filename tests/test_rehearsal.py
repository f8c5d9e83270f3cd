import gc
from functools import partial

import pytest

from litgpt.rehearsal import Data, Rehearsal, Setting, Size

TRAINING = Setting(B=2, T=4, backward=True)


def wide_linear(run: Rehearsal, x: Size) -> Size:
    """From 10 to 30 numbers a token."""
    return run.linear("mlp.fc", x, 10, 30)


def test_memory_is_in_use_until_the_last_reference_goes():
    run = Rehearsal(TRAINING)
    x = Size(10, 4, Data(run, 40))
    part = run.view(x, 5)
    assert run.live == 40
    del x
    assert run.live == 40
    del part
    assert (run.live, run.peak) == (0, 40)


def test_no_cycle_of_references_delays_the_end_of_memory():
    gc.disable()
    try:
        run = Rehearsal(TRAINING)
        y = run.like(wide_linear(run, run.source(80, 4, True)))
        run.backward(y.node, Data(run, 240))
        y = None
        assert run.live == sum(d.n_bytes for d in run.gradients) == 1200
    finally:
        gc.enable()


def test_linear_keeps_input_only_where_its_weight_is_trained():
    for trains_base, kept in ((True, 80 * 4), (False, 0)):
        run = Rehearsal(Setting(backward=True, trains_base=trains_base))
        y = wide_linear(run, run.source(80, 4, True))
        assert run.live == y.n * 4 + kept


def test_autocast_keeps_copies_of_weights_that_it_may_use_again():
    run = Rehearsal(Setting(param_bytes=4, compute_bytes=2, backward=True))
    stage = run.stage(run.source(80, 4, True), partial(wide_linear, run))
    assert stage.saved == 2 * (80 + 300) and stage.casts == 0  # the graph keeps the copy of the weight anyway
    assert stage.gradients == 4 * 300
    run = Rehearsal(Setting(param_bytes=4, compute_bytes=2))
    stage = run.stage(run.source(80, 4, True), partial(wide_linear, run))
    assert (stage.saved, stage.casts) == (0, 2 * 300)


def test_quantized_weights_are_unpacked_for_one_use_at_a_time():
    run = Rehearsal(Setting(quantized=True, backward=True, trains_base=False, param_bytes=2, compute_bytes=2))
    stage = run.stage(run.source(80, 2, True), partial(wide_linear, run))
    assert stage.forward_peak == 2 * (80 + 300 + 240) and stage.saved == 0
    assert stage.backward_peak == 2 * (240 + 300 + 80)


def test_gradients_of_an_earlier_batch_are_added_to():
    for holds, left in ((False, 1200), (True, 0)):
        run = Rehearsal(Setting(backward=True, holds_gradients=holds))
        stage = run.stage(run.source(80, 4, True), partial(wide_linear, run))
        assert stage.gradients == left
        assert stage.backward_peak == 4 * (240 + 80 + 80 + 300)  # its gradient, the input and that of it, the weight's


def test_lora_has_its_own_weights_for_each_part():
    run = Rehearsal(Setting(trains_base=False, lora_r=4, lora_parts=frozenset({"query", "value"})))
    run.linear("attn.qkv", run.source(80, 4, True), 10, 50, lora={"query": 30, "key": 10, "value": 10})
    assert run.shapes["attn.qkv.lora_A"] == ((8, 10), 1)
    assert run.shapes["attn.qkv.lora_B"] == ((40, 4), 1)


@pytest.mark.parametrize(("device", "mask_bytes"), [("cpu", 4 * 80), ("cuda", 80)])
def test_dropout_keeps_factors_on_the_cpu_and_booleans_on_cuda(device, mask_bytes):
    run = Rehearsal(Setting(backward=True, device=device))
    x = run.source(80, 4, True)
    y = run.dropout(x, 0.1)
    assert y is not x and run.live == 2 * 4 * 80 + mask_bytes
    assert run.dropout(x, 0.0) is x
