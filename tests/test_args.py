import pytest

from litgpt.args import EvalArgs, LogArgs, TrainArgs


def test_defaults_are_the_published_ones():
    train = TrainArgs()
    assert (train.save_interval, train.log_interval, train.global_batch_size, train.micro_batch_size) == (
        1000,
        1,
        64,
        4,
    )
    assert (train.lr_warmup_steps, train.min_lr, train.max_norm, train.epochs) == (100, 6e-5, None, None)
    assert (EvalArgs().interval, EvalArgs().max_iters, EvalArgs().evaluate_example) == (600, 100, "first")
    assert LogArgs().save_logs is True and LogArgs().project is None


def test_global_batch_is_split_over_devices_and_micro_batches():
    train = TrainArgs(global_batch_size=64, micro_batch_size=4)
    assert train.batch_size(devices=2, num_nodes=2) == 16
    assert train.gradient_accumulation_iters(devices=2, num_nodes=2) == 4


@pytest.mark.parametrize(
    ("global_batch_size", "micro_batch_size", "devices", "numbers"),
    [
        (64, 5, 1, ["--train.micro_batch_size 5", "64 samples", "A global batch size of 65"]),
        (10, 1, 4, ["--train.global_batch_size 10", "4 devices", "A global batch size of 8"]),
        (2, 4, 1, ["--train.micro_batch_size 4", "--train.global_batch_size 2", "A global batch size of 4"]),
        (2, 1, 8, ["--train.global_batch_size 2", "8 devices", "A global batch size of 8"]),
    ],
)
def test_batch_that_does_not_divide_is_an_error_with_the_numbers(global_batch_size, micro_batch_size, devices, numbers):
    train = TrainArgs(global_batch_size=global_batch_size, micro_batch_size=micro_batch_size)
    with pytest.raises(ValueError) as error:
        train.gradient_accumulation_iters(devices)
    assert all(n in str(error.value) for n in numbers), str(error.value)
    assert "\n" not in str(error.value)
    fitting = int(str(error.value).split("A global batch size of ")[1].split()[0])
    TrainArgs(global_batch_size=fitting, micro_batch_size=micro_batch_size).gradient_accumulation_iters(devices)


def test_zero_devices_are_an_error():
    with pytest.raises(ValueError, match="0 devices"):
        TrainArgs().batch_size(devices=0)


@pytest.mark.parametrize(
    ("fields", "max_iters", "expected"),
    [
        (dict(lr_warmup_steps=10), 1000, 160),
        (dict(lr_warmup_steps=10), 50, 50),
        (dict(lr_warmup_steps=0), 1000, 0),
        (dict(lr_warmup_steps=None), 1000, 0),
        (dict(lr_warmup_steps=None, lr_warmup_fraction=0.25), 1000, 3),
        (dict(lr_warmup_steps=0, lr_warmup_fraction=1.0), 5, 5),
    ],
)
def test_warmup_iters_never_exceed_the_run(fields, max_iters, expected):
    assert TrainArgs(**fields).warmup_iters(1, 1, max_iters, train_dataloader=range(10)) == expected


def test_warmup_shorter_than_the_run_is_left_alone():
    assert TrainArgs(lr_warmup_steps=10).warmup_steps(11) == 10
    assert TrainArgs(lr_warmup_steps=None).warmup_steps(11) == 0
    assert TrainArgs(lr_warmup_steps=None, lr_warmup_fraction=0.1).warmup_steps(50, steps_per_epoch=25) == 3


@pytest.mark.parametrize("max_steps", [1, 20, 100])
def test_warmup_as_long_as_the_run_is_cut_with_a_warning(max_steps):
    with pytest.warns(UserWarning, match=f"the whole run of {max_steps} steps"):
        assert TrainArgs(lr_warmup_steps=100).warmup_steps(max_steps) == max_steps // 10


def test_warmup_fraction_needs_a_known_length():
    with pytest.raises(ValueError, match="lr_warmup_steps instead"):
        TrainArgs(lr_warmup_steps=None, lr_warmup_fraction=0.1).warmup_steps(50)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(lr_warmup_fraction=0.5), "exclude each other"),
        (dict(lr_warmup_fraction=1.5, lr_warmup_steps=None), "--train.lr_warmup_fraction is 1.5"),
        (dict(lr_warmup_steps=-1), "--train.lr_warmup_steps is -1"),
        (dict(global_batch_size=0), "--train.global_batch_size is 0"),
        (dict(micro_batch_size=-2), "--train.micro_batch_size is -2"),
        (dict(max_norm=0.0), "--train.max_norm is 0.0"),
        (dict(max_tokens=0), "--train.max_tokens is 0"),
        (dict(decay_fraction=2.0), "--train.decay_fraction is 2.0"),
        (dict(keep_checkpoints=0), "--train.keep_checkpoints is 0"),
        (dict(save_interval=0), "--train.save_interval is 0"),
        (dict(max_norm=float("nan")), "--train.max_norm is nan"),
    ],
)
def test_impossible_training_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainArgs(**fields)


@pytest.mark.parametrize("field", ["interval", "max_iters", "max_new_tokens"])
def test_impossible_validation_settings_are_refused(field):
    with pytest.raises(ValueError, match=f"--eval.{field} is 0"):
        EvalArgs(**{field: 0})
