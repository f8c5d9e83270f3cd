"""FLAN: 66 tasks, each dressed in ten instructions (arXiv:2109.01652)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.config import nearest
from litgpt.data.download import download_file
from litgpt.data.json_data import load_files
from litgpt.data.rows import read_rows
from litgpt.data.sft import SFTDataModule
from litgpt.prompts import PromptStyle

_URL = "https://huggingface.co/datasets/Muennighoff/flan/resolve/main"

_TASKS = """
aeslc ag_news_subset anli_r1 anli_r2 anli_r3 arc_challenge arc_easy bool_q cb cnn_dailymail cola common_gen copa coqa
cosmos_qa dart definite_pronoun_resolution drop e2e_nlg fix_punct gigaword glue_mrpc glue_qqp hellaswag imdb_reviews
math_dataset mnli_matched mnli_mismatched multi_news multirc natural_questions openbookqa opinion_abstracts_idebate
opinion_abstracts_rotten_tomatoes para_crawl_enes paws_wiki piqa qnli quac record rte samsum sentiment140 snli squad_v1
squad_v2 sst2 story_cloze stsb trec trivia_qa true_case web_nlg_en wic wiki_lingua_english_en wmt14_enfr
wmt16_translate_csen wmt16_translate_deen wmt16_translate_fien wmt16_translate_roen wmt16_translate_ruen
wmt16_translate_tren wnli word_segment wsc yelp_polarity_reviews
"""

SUBSETS = tuple(f"{task}_10templates" for task in _TASKS.split())


@dataclass(kw_only=True)
class FLAN(SFTDataModule):
    """The FLAN collection: classic tasks as instructions."""

    prompt_style: str | PromptStyle = "flan"
    """How an instruction is dressed: a prompt style, or "template" for the chat template of the tokenizer."""
    download_dir: Path = Path("./data/flan")
    """Folder for the download."""
    url: str = _URL
    """Where the files are fetched from."""
    subsets: str | None = None
    """Names of tasks such as `cola_10templates`, with commas between. Default: all 66."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.download_dir = Path(self.download_dir).expanduser()
        for name in self.subset_names():
            if name not in SUBSETS:
                likely = nearest(name, SUBSETS) or SUBSETS
                raise ValueError(f"--data.subsets: FLAN has no {name!r}; did you mean {', '.join(likely[:3])}?")

    def subset_names(self) -> Sequence[str]:
        """The chosen tasks."""
        return SUBSETS if self.subsets is None else [name.strip() for name in self.subsets.split(",")]

    def prepare_data(self) -> None:
        for split in ("train", "test"):
            self.files(split)

    def files(self, split: str) -> list[Path]:
        """The files of `split`, "train" or "test", fetched if need be."""
        names = [f"{subset}_{split}.jsonl" for subset in self.subset_names()]
        return [download_file(f"{self.url}/{split}/{name}", self.download_dir / name) for name in names]

    def load_samples(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        return tuple(
            [{"instruction": r["inputs"], "output": r["targets"]} for r in load_files(self.files(split), check=False)]
            for split in ("train", "test")
        )


def load_jsonl(filename: Path) -> list[dict[str, str]]:
    """The objects of a JSON Lines file."""
    return list(read_rows(Path(filename)))
