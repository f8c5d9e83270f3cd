"""The reference model of preference tuning: loaded beside the one that is tuned, or asked once before the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt.data.base import DataModule
from litgpt.data.documents import hash_texts
from litgpt.data.preference_dataset import reference_table
from litgpt.finetune.loading import build_model
from litgpt.finetune.method import Method
from litgpt.finetune.settings import Settings
from litgpt.parallel import is_sharded
from litgpt.preference import PreferenceObjective, quiet
from litgpt.registry import ModelSpec
from litgpt.surgery import cast_frozen, freeze
from litgpt.tokenizer import Tokenizer
from litgpt.training import open_dataloaders, wide_dtype

if TYPE_CHECKING:
    import lightning as L


class FrozenReference:
    """The model as it was before the tuning, beside the one that is tuned."""

    def __init__(self) -> None:
        self.fabric: L.Fabric | None = None
        self.model: nn.Module | None = None

    def load(self, fabric: "L.Fabric", spec: ModelSpec, config: Config, settings: Settings) -> None:
        """Load it the way the tuned one is, also when a run is resumed."""
        model = build_model(fabric, Method(), spec, config, settings, None)
        freeze(model)
        precision = str(fabric.strategy.precision.precision)
        if precision.endswith("-mixed"):
            cast_frozen(model, torch.bfloat16 if precision.startswith("bf16") else torch.float16)
        self.fabric, self.model = fabric, fabric.setup_module(model) if is_sharded(fabric) else model.eval()

    @contextmanager
    def __call__(self, policy: nn.Module) -> Iterator[nn.Module]:
        with self.fabric.autocast():
            yield self.model

    def unload(self) -> None:
        """Free its memory."""
        self.model = None


class Preparation:
    """What happens before the run: the reference model is loaded, or its log-probabilities are worked out.

    Args:
        objective: Gets the reference.
        needs_copy: Whether the method changes the model so that it cannot be its own reference.
        precompute: Work out all log-probabilities of the reference now, or read those of an earlier run.
    """

    def __init__(self, objective: PreferenceObjective, needs_copy: bool, precompute: bool) -> None:
        self.objective, self.precompute = objective, precompute
        self.reference = FrozenReference() if needs_copy or precompute else None

    def __call__(
        self,
        fabric: "L.Fabric",
        spec: ModelSpec,
        config: Config,
        data: DataModule,
        settings: Settings,
        tokenizer: Tokenizer,
    ) -> None:
        if self.reference is None:
            return
        self.objective.reference = self.reference
        if not self.precompute:
            self.reference.load(fabric, spec, config, settings)
            return
        data.reference_key = reference_key(fabric, settings)
        context = min(x for x in (settings.train.max_seq_length, getattr(config, "block_size", None)) if x is not None)
        vocab_size = getattr(config, "padded_vocab_size", None)
        batch_size = settings.train.micro_batch_size
        open_dataloaders(fabric, data, tokenizer, batch_size, context, vocab_size=vocab_size)
        datasets = [data.train_dataset, *([data.test_dataset] if data.test_dataset is not None else [])]
        if all(dataset.reference is not None for dataset in datasets):
            fabric.print("Using the reference's log-probabilities worked out before.")
            return
        self.reference.load(fabric, spec, config, settings)
        for dataset in datasets:
            fabric.print(f"Working out the reference's log-probabilities of {len(dataset):,} pairs ...")
            table = reference_table(dataset, self.log_probs, batch_size).to(fabric.device, wide_dtype(fabric.device))
            table = fabric.all_reduce(table, reduce_op="sum").cpu()
            if fabric.local_rank == 0:
                dataset.save_reference((table[:, :2] / table[:, 2:]).float())
        self.reference.unload()
        fabric.barrier()

    def log_probs(self, examples: list[dict[str, Any]]) -> Tensor:
        """Of the chosen answers, then of the rejected ones."""
        batch = self.objective.collate(examples, "eval", torch.Generator())
        device = self.reference.fabric.device
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        with self.reference(None) as model, quiet(model):
            return self.objective.log_probs(model, batch)


def reference_key(fabric: "L.Fabric", settings: Settings) -> str:
    """Says which weights the reference has, and in which precision."""
    files = [path for path in sorted(settings.checkpoint_dir.iterdir()) if path.is_file()]
    stamps = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    where = [str(settings.checkpoint_dir.resolve()), str(fabric.strategy.precision.precision), str(settings.quantize)]
    return hash_texts([*where, fabric.device.type, *stamps])[:16]
