"""Adapter folders of the library PEFT (adapter_config.json, adapter_model.safetensors) from and to our LoRA files.

Families differ in what is one matrix on Hugging Face: an update of ours becomes one for each of its projections, or
several updates of ours become one of a higher rank, with zeros where they have nothing to say to each other.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from litgpt.checkpoint.adapter import StateDictAdapter, find_model_type
from litgpt.checkpoint.atomic import atomic_folder
from litgpt.checkpoint.export import TOKENIZER_FILES
from litgpt.checkpoint.folders import copy_config_files, existing_file, some
from litgpt.checkpoint.hf_config import read_hf_config
from litgpt.checkpoint.layouts import order_heads
from litgpt.checkpoint.lazy import LazyTensor
from litgpt.checkpoint.loading import open_model_weights
from litgpt.checkpoint.lora_merge import LORA_NAME, Update, read_updates
from litgpt.checkpoint.meta import meta_device
from litgpt.checkpoint.tensors import open_weights
from litgpt.checkpoint.torch_file import save_torch
from litgpt.config import Config, save_config
from litgpt.lora import LoRASettings, add_lora, is_lora, switches_for
from litgpt.low_rank import row_norms
from litgpt.model import GPT

CONFIG_NAME, ADAPTER_NAME = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
_REFUSED = (
    "fan_in_fan_out", "modules_to_save", "lora_bias", "layer_replication", "trainable_token_indices",
    "target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens",
)  # fmt: skip
"""Options of PEFT that change what an adapter computes and that LoRA here does not have."""


@dataclass(frozen=True)
class _Rows:
    """An update of some rows of a matrix on Hugging Face."""

    begin: int
    update: Update


def export_peft(
    lora_dir: Path,
    base_dir: Path,
    config: Config,
    settings: LoRASettings,
    output_dir: Path,
    base_name: str | None = None,
) -> Path:
    """Write the updates of a LoRA folder as an adapter folder that PEFT, vLLM and TGI load; it appears when complete.

    Args:
        lora_dir: Holds `lit_model.pth.lora`.
        base_dir: The model that was finetuned, a litgpt or Hugging Face folder.
        config: Of the model.
        settings: That the updates were trained with.
        output_dir: Does not exist, is empty, or is an earlier adapter folder, which is replaced.
        base_name: What the adapter calls its base model; default: the repo of the config, else `base_dir`.

    Returns:
        The file with the weights.

    Raises:
        ValueError: The file does not fit, or Hugging Face has no such model.
    """
    from safetensors.torch import save_file

    _check_replaceable(output_dir)
    base, adapter = open_model_weights(base_dir, config), _name_table(base_dir, config)
    try:
        updates = read_updates(open_weights(lora_dir / LORA_NAME), settings, config, adapter.shapes)
    except ValueError as error:
        raise ValueError(f"{lora_dir / LORA_NAME} does not fit its model and settings: {error}") from None
    shapes, parts = _hf_shapes(adapter), _by_matrix(updates, adapter)
    matrices = {name: _assemble(name, rows, shapes[name][0], adapter) for name, rows in parts.items()}
    rank = max(update.A.size(0) for update in matrices.values())
    if any(update.magnitude is not None and update.magnitude.isnan().any() for update in matrices.values()):
        matrices = _fill_lengths(matrices, adapter.to_hf(base))
    tensors: dict[str, Tensor] = {}
    for name, update in matrices.items():
        module = _live_name(name.removesuffix(".weight"), adapter.model_type)
        stem, missing = f"base_model.model.{module}", rank - update.A.size(0)
        tensors[f"{stem}.lora_A.weight"] = torch.nn.functional.pad(update.A, (0, 0, 0, missing)).contiguous()
        tensors[f"{stem}.lora_B.weight"] = torch.nn.functional.pad(update.B, (0, missing)).contiguous()
        if update.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = update.magnitude.contiguous()
    base_name = base_name or "/".join(filter(None, (config.hf_config.get("org"), config.hf_config.get("name"))))
    modules = {_live_name(name.removesuffix(".weight"), adapter.model_type) for name in matrices}
    others = {_live_name(n.removesuffix(".weight"), adapter.model_type) for n in shapes} - modules
    values = _peft_config(settings, rank, _targets(modules, others), base_name or str(base_dir))
    with atomic_folder(output_dir) as folder:
        save_file(tensors, folder / ADAPTER_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for file in (lora_dir / name for name in TOKENIZER_FILES):
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
    return output_dir / ADAPTER_NAME


def _by_matrix(updates: Mapping[str, Update], adapter: StateDictAdapter) -> dict[str, list[_Rows]]:
    """The parts of our updates by the matrix on Hugging Face that they belong to, rows in our order."""
    found: dict[str, list[_Rows]] = defaultdict(list)
    shapes = _hf_shapes(adapter)
    for name, update in updates.items():
        source, begin = adapter.sources[name], 0
        for file_name in source.names:
            n_rows = shapes[file_name][0] if len(source.names) > 1 else adapter.shapes[name][0]
            for (start, stop), part in zip(update.parts, update.split()):
                low, high = max(begin, start), min(begin + n_rows, stop)
                if low < high:
                    rows = slice(low - start, high - start)
                    length = None if part.magnitude is None else part.magnitude[rows]
                    cut = Update(part.A, part.B[rows], ((0, high - low),), part.scaling, length)
                    found[file_name].append(_Rows(low - begin + source.part * n_rows, cut))
            begin += n_rows
    return found


def _assemble(name: str, parts: list[_Rows], n_rows: int, adapter: StateDictAdapter) -> Update:
    """One update of a whole matrix, in the order of its rows on Hugging Face; lengths that nobody knows are NaN."""
    update = parts[0].update
    if len(parts) > 1 or len(update.B) < n_rows:
        rank, scaling = sum(part.update.B.size(1) for part in parts), update.scaling
        B, at = update.B.new_zeros(n_rows, rank), 0
        magnitude = None if update.magnitude is None else update.B.new_full((n_rows,), float("nan"))
        for part in parts:
            rows, r = slice(part.begin, part.begin + len(part.update.B)), part.update.B.size(1)
            B[rows, at : at + r] = part.update.B
            if magnitude is not None:
                magnitude[rows] = part.update.magnitude
            at += r
        update = Update(torch.cat([part.update.A for part in parts]), B, ((0, n_rows),), scaling, magnitude)
    if any(name in source.names and source.grouped for source in adapter.sources.values()):
        update = _reorder(update, adapter.config, grouped=True)
    return update


def _reorder(update: Update, config: Config, grouped: bool) -> Update:
    """The rows of a fused projection in the order of the file (`grouped`) or in ours."""

    def reorder(rows: Tensor | None) -> Tensor | None:
        heads = config.n_head, config.n_query_groups
        return None if rows is None else order_heads(LazyTensor.of(rows), *heads, grouped=grouped).read()

    return replace(update, B=reorder(update.B), magnitude=reorder(update.magnitude))


def _fill_lengths(matrices: Mapping[str, Update], base: Mapping[str, LazyTensor]) -> dict[str, Update]:
    """Gives rows that have no length of their own that of the frozen weight, which leaves them as they are."""
    filled = {}
    for name, update in matrices.items():
        lengths = row_norms(base[name].read()).to(update.magnitude.dtype)
        filled[name] = replace(update, magnitude=torch.where(update.magnitude.isnan(), lengths, update.magnitude))
    return filled


def _live_name(module: str, model_type: str) -> str:
    """What transformers calls a module while it runs, where that is not its name in files."""
    return "lm_head" if (model_type, module) == ("gpt_neox", "embed_out") else module


def _targets(modules: set[str], others: set[str]) -> list[str]:
    """The last parts of the names where they mean no other module, else the names in full."""
    leaves = {module.rpartition(".")[2] for module in modules}
    return sorted(modules if any(other.rpartition(".")[2] in leaves for other in others) else leaves)


def _peft_config(settings: LoRASettings, rank: int, targets: list[str], base_name: str) -> dict[str, Any]:
    alpha = settings.scaling * (rank**0.5 if settings.use_rslora else rank)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True,
        "r": rank, "lora_alpha": round(alpha) if abs(alpha - round(alpha)) < 1e-6 else alpha,
        "lora_dropout": settings.dropout, "target_modules": targets, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
        "use_rslora": settings.use_rslora, "use_dora": settings.use_dora,
    }  # fmt: skip


def _check_replaceable(output_dir: Path) -> None:
    known = {CONFIG_NAME, ADAPTER_NAME, *TOKENIZER_FILES}
    others = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
    if output_dir.is_file() or (others and (CONFIG_NAME not in others or set(others) - known)):
        raise ValueError(f"{output_dir} holds something else than an adapter: name a folder that does not exist yet")


def _name_table(base_dir: Path, config: Config) -> StateDictAdapter:
    hf_values = read_hf_config(base_dir) if (base_dir / "config.json").is_file() else None
    return StateDictAdapter(config, find_model_type(config, hf_values))


def _hf_shapes(adapter: StateDictAdapter) -> dict[str, tuple[int, ...]]:
    """Of the matrices and vectors on Hugging Face, a head that is tied to the embedding too."""
    heads = {n: adapter.shapes[name] for name in adapter.optional for n in adapter.sources[name].names}
    return adapter.hf_shapes() | heads


def is_peft_folder(folder: Path) -> bool:
    """Whether the folder holds an adapter of PEFT."""
    return (folder / CONFIG_NAME).is_file()


def import_peft(adapter_dir: Path, base_dir: Path, config: Config, output_dir: Path) -> Path:
    """Write an adapter of PEFT as a LoRA folder, which `merge_lora` and further finetuning take.

    Args:
        adapter_dir: Holds adapter_config.json and adapter_model.safetensors.
        base_dir: The model that the adapter belongs to, a litgpt or Hugging Face folder.
        config: Of that model.
        output_dir: Does not exist, or is empty.

    Returns:
        The LoRA file.
    """
    if output_dir.is_file() or (output_dir.is_dir() and any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} is not empty: name a folder that does not exist yet")
    settings, tensors = read_peft(adapter_dir, base_dir, config)
    flags = {("lora_" + name.removeprefix("use_")): value for name, value in vars(settings).items()}
    with atomic_folder(output_dir) as folder:
        save_torch({"model": tensors}, folder / LORA_NAME)
        copy_config_files(base_dir, folder)
        save_config(config, folder)
        record = {"checkpoint_dir": str(base_dir.absolute()), **{k: v for k, v in flags.items() if v is not None}}
        (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")
    return output_dir / LORA_NAME


def read_peft(adapter_dir: Path, base_dir: Path, config: Config) -> tuple[LoRASettings, dict[str, Tensor]]:
    """Settings for `add_lora`, and the weights of the updates in our names and layout.

    Layers that the settings mean and the adapter does not have get an update of zeros, with A at zero too, so that they
    stay as they are.

    Raises:
        ValueError: It is no LoRA adapter, uses what LoRA here does not have, or belongs to another model.
    """
    values, adapter = _read_peft_config(adapter_dir), _name_table(base_dir, config)
    matrices = _read_matrices(adapter_dir, values, adapter)
    parts = _by_weight(matrices, adapter)
    rank = max(part.update.B.size(1) for found in parts.values() for part in found)
    first = next(iter(matrices.values())).scaling
    is_rslora, is_dora = bool(values.get("use_rslora")), bool(values.get("use_dora"))
    settings = LoRASettings(
        r=rank, alpha=first * (rank**0.5 if is_rslora else rank), dropout=values.get("lora_dropout") or 0.0,
        use_rslora=is_rslora, use_dora=is_dora, **_find_targets(parts, adapter),
    )  # fmt: skip
    with meta_device():
        model = add_lora(GPT(config), settings)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if is_lora(name):
            fill = float("nan") if name.endswith("lora_magnitude") else 0.0
            tensors[name] = torch.full(tensor.shape, fill)
    for name, found in parts.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        stem, sizes = name.removesuffix("weight"), layer.part_sizes
        for part in found:
            i = next(i for i, (start, _) in enumerate(layer.parts) if start == part.begin)
            at, r = sum(sizes[:i]), part.update.B.size(1)
            tensors[f"{stem}lora_A"][i * rank : i * rank + r] = part.update.A
            tensors[f"{stem}lora_B"][at : at + sizes[i], :r] = part.update.B * (part.update.scaling / first)
            if is_dora:
                tensors[f"{stem}lora_magnitude"][at : at + sizes[i]] = part.update.magnitude
    if any(tensor.isnan().any() for name, tensor in tensors.items() if name.endswith("lora_magnitude")):
        base = open_model_weights(base_dir, config)
        for name in [name for name in tensors if name.endswith("lora_magnitude")]:
            layer = model.get_submodule(name.removesuffix(".lora_magnitude"))
            lengths = layer.of_parts(row_norms(base[name.replace("lora_magnitude", "weight")].read()))
            tensors[name] = torch.where(tensors[name].isnan(), lengths, tensors[name])
    return settings, tensors


def _read_peft_config(adapter_dir: Path) -> dict[str, Any]:
    path = existing_file(adapter_dir / CONFIG_NAME)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else "no JSON object"
        raise ValueError(f"{path} describes no LoRA adapter ({kind!r}); only those can be read")
    if used := [name for name in _REFUSED if values.get(name)]:
        raise ValueError(f"{path} uses {', '.join(used)}, which LoRA here does not have: merge the adapter in PEFT")
    return values


def _read_matrices(adapter_dir: Path, values: Mapping[str, Any], adapter: StateDictAdapter) -> dict[str, Update]:
    """The updates of an adapter, by the name of the matrix on Hugging Face."""
    tensors = open_weights(adapter_dir / ADAPTER_NAME)
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if (match := _TENSOR.fullmatch(name)) is None:
            raise ValueError(f"{adapter_dir / ADAPTER_NAME} holds `{name}`, which is no part of a LoRA adapter")
        found[match[1]][match[2]] = tensor.read().float()
    shapes, updates = _hf_shapes(adapter), {}
    for module, leaves in found.items():
        spelled = next((s for s in adapter.spellings(f"{module}.weight") if s in shapes), None)
        a, b, lengths = (leaves.get(leaf) for leaf in ("lora_A", "lora_B", "lora_magnitude_vector"))
        if spelled is None or a is None or b is None or (len(b), a.size(1)) != shapes[spelled]:
            raise ValueError(
                f"{adapter_dir} has an update for `{module}`, which does not fit the model: {adapter.model_type}"
            )
        r, alpha = len(a), _pattern(values.get("alpha_pattern"), module, values.get("lora_alpha", 8))
        scaling = alpha / (r**0.5 if values.get("use_rslora") else r)
        updates[spelled] = Update(a, b, ((0, len(b)),), scaling, None if lengths is None else lengths.flatten())
    if not updates:
        raise ValueError(f"{adapter_dir / ADAPTER_NAME} holds no updates")
    return updates


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: float) -> float:
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _by_weight(matrices: Mapping[str, Update], adapter: StateDictAdapter) -> dict[str, list[_Rows]]:
    """The updates by our weight that they belong to, with their rows there."""
    found: dict[str, list[_Rows]] = defaultdict(list)
    shapes = _hf_shapes(adapter)
    for name, source in adapter.sources.items():
        n_rows, begin = adapter.shapes[name][0], 0
        for file_name in source.names:
            if (update := matrices.get(file_name)) is not None:
                update = _reorder(update, adapter.config, grouped=False) if source.grouped else update
                if source.of > 1:
                    rows = slice(source.part * n_rows, (source.part + 1) * n_rows)
                    lengths = None if update.magnitude is None else update.magnitude[rows]
                    update = replace(update, B=update.B[rows], parts=((0, n_rows),), magnitude=lengths)
                found[name].append(_Rows(begin, update))
            begin += shapes[file_name][0]
    return found


def _find_targets(parts: Mapping[str, list[_Rows]], adapter: StateDictAdapter) -> dict[str, Any]:
    """The fields of `LoRASettings` that mean these weights: targets where query, key and value share an update."""
    modules = [name.removesuffix(".weight") for name in parts]
    is_fused = any(len(adapter.sources[name].names) == 1 for name in parts if name.endswith("attn.qkv.weight"))
    if is_fused:
        return {"targets": modules}
    sizes = [n * adapter.config.head_size for n in (adapter.config.n_head, adapter.config.n_query_groups)]
    begins = {"query": 0, "key": sizes[0], "value": sum(sizes)}
    used = {part.begin for name, found in parts.items() if name.endswith("attn.qkv.weight") for part in found}
    on = {switch for switch, begin in begins.items() if begin in used}
    on |= {switch for module in modules if not module.endswith("attn.qkv") for switch in switches_for(module)}
    if unknown := [module for module in modules if not module.endswith("attn.qkv") and not switches_for(module)]:
        raise ValueError(f"the adapter has updates for {some(unknown)}, which no switch of LoRA means")
    return {switch: switch in on for switch in ("query", "key", "value", "projection", "mlp", "head")}
