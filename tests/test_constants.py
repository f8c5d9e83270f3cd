from importlib.metadata import version

import pytest

from litgpt.constants import _SUPPORTED_LOGGERS, _TORCH_EQUAL_2_7, Requirement


def test_loggers_are_the_published_ones():
    assert _SUPPORTED_LOGGERS == ("csv", "tensorboard", "wandb", "mlflow", "litlogger")


@pytest.mark.parametrize("text", ["torch", "torch>=2.0", "torch>=2.0,!=2.0.5", "torch <99", "pyyaml>=3"])
def test_requirement_that_is_met_is_true(text):
    assert Requirement(text)


@pytest.mark.parametrize(
    "text", ["no-such-package", "no_such_package>=1", "torch>=99", "torch>=2.0,<2.1", "torch==1.0"]
)
def test_requirement_that_is_not_met_is_false_and_says_how_to_meet_it(text):
    assert not Requirement(text)
    assert f"pip install '{text}'" in str(Requirement(text))


def test_installed_version_equals_itself():
    release = ".".join(version("torch").split("+")[0].split(".")[:3])
    assert Requirement(f"torch=={release}")
    assert not Requirement(f"torch!={release}")


def test_module_without_package_data_counts_as_installed():
    assert Requirement("json")


def test_torch_is_newer_than_2_7():
    assert not _TORCH_EQUAL_2_7
