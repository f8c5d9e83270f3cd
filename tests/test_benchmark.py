from collections.abc import Iterator

import pytest
import torch

from litgpt.benchmark import benchmark_dict_to_markdown_table, measure

CPU = torch.device("cpu")


class Generator:
    """Counts its calls; gives the ids 0, 1, 2."""

    n_calls = 0

    def __call__(self, *, return_as_token_ids: bool, stream: bool = False) -> torch.Tensor | Iterator[torch.Tensor]:
        assert return_as_token_ids
        self.n_calls += 1
        return (torch.tensor([i]) for i in range(3)) if stream else torch.arange(3)


@pytest.mark.parametrize("stream", [False, True])
def test_measure_generates_once_for_each_iteration(stream: bool) -> None:
    generate = Generator()
    ids, figures = measure(generate, 4, CPU, stream=stream)
    assert generate.n_calls == 4 and ids.tolist() == [0, 1, 2]
    assert figures["Tokens generated"] == [3] * 4 and all(len(values) == 4 for values in figures.values())
    assert ("Seconds to first token" in figures) is stream
    speeds = [3 / seconds for seconds in figures["Seconds total"]]
    assert figures["Inference speed in tokens/sec"] == pytest.approx(speeds)


def test_time_to_the_first_token_is_a_part_of_the_whole() -> None:
    _, figures = measure(Generator(), 1, CPU, stream=True)
    assert 0 < figures["Seconds to first token"][0] <= figures["Seconds total"][0]


def test_measure_refuses_no_iterations() -> None:
    with pytest.raises(ValueError, match="num_iterations 0"):
        measure(Generator(), 0, CPU)


def test_table_copes_with_one_value_and_none() -> None:
    table = benchmark_dict_to_markdown_table({"a": [1.0, 3.0], "b": [None, None], "c": [2.0]})
    assert table.splitlines()[2:] == ["| a | 2.00 | 1.41 |", "| b | - | - |", "| c | 2.00 | - |"]
