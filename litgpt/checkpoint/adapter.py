"""Weights by Hugging Face names to weights by ours and back, as the tables of `weight_maps` say.

Both directions make lazy tensors out of lazy tensors: nothing is read, and weights then move from file to model, or
from file to file, one at a time.
"""

import copy
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from math import prod

from litgpt.checkpoint.folders import some
from litgpt.checkpoint.layouts import dequantize_fp8, join, order_heads, same, unstack_experts
from litgpt.checkpoint.lazy import LazyTensor
from litgpt.checkpoint.meta import meta_device
from litgpt.checkpoint.weight_maps import (
    NUMBER,
    TEXT_PART,
    WEIGHT_MAPS,
    Source,
    WeightMap,
    find_model_type,
    is_hf_names,
    known_type,
    module_pattern,
)  # fmt: skip
from litgpt.config import Config, nearest
from litgpt.model import GPT

__all__ = ["StateDictAdapter", "find_model_type", "is_hf_names", "lit_shapes"]

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
Shape = tuple[int, ...]


class StateDictAdapter:
    """The weights of one config under the names of one Hugging Face model type, in both directions."""

    def __init__(
        self, config: Config, model_type: str | WeightMap | None = None, shapes: Mapping[str, Shape] | None = None
    ) -> None:
        """Finds out where each tensor of the model stands in the file.

        Args:
            config: Of the model.
            model_type: As in config.json, or a table of your own; default: see `find_model_type`.
            shapes: Of the weights of the model by our names, where it has others than a GPT of this config.

        Raises:
            ValueError: The type is unknown, or its files have no place for a part that the model has.
        """
        is_table = isinstance(model_type, WeightMap)
        self.model_type = "custom" if is_table else known_type(model_type or find_model_type(config))
        self.table = model_type if is_table else WEIGHT_MAPS[self.model_type]
        self.config, self.shapes = config, dict(shapes or lit_shapes(config))
        self.optional = {HEAD} if config.tie_embeddings else set()  # a tied head may be read, but is not written
        self.sources: dict[str, Source] = {}
        rows = self.table.rows(config)
        for name in self.shapes:
            module, leaf = name.rpartition(".")[::2]
            if (row := rows.get(module_pattern(name))) is None:
                raise ValueError(
                    f"a {self.model_type} file has no place for `{name}`; by its features the config "
                    f"{config.name or 'of this model'} is rather {find_model_type(config)}, if Hugging Face knows it"
                )
            numbers = NUMBER.findall(module)
            self.sources[name] = replace(row, names=tuple(f"{n.format(*numbers)}.{leaf}" for n in row.names))

    def hf_shapes(self) -> dict[str, Shape]:
        """Names and shapes of the tensors in the file, from the config alone."""
        return {n: shape for name in self._wanted() for n, shape in self._file_shapes(name)}

    def from_hf(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Our names and layout for the tensors of a file.

        Args:
            tensors: All tensors of the checkpoint by name. Weights in FP8 come with their `weight_scale_inv`; experts
                stand one by one or stacked; a head that the config ties may be there or not.

        Raises:
            ValueError: A tensor is unknown, missing, quantized, or not of the shape that the config gives it.
        """
        found = self._recognise(dequantize_fp8(unstack_experts(tensors)))
        for name, tensor in found.items():
            if not tensor.dtype.is_floating_point:
                raise ValueError(
                    f"`{name}` is {tensor.dtype}: weights quantized so cannot be read; take the plain ones"
                )
        _check_shapes(found, {n: shape for name in self.sources for n, shape in self._file_shapes(name)}, self.config)
        heads = self.config.n_head, self.config.n_query_groups
        ours: dict[str, LazyTensor] = {}
        has_head = HEAD in self.sources and self.sources[HEAD].names[0] in found
        for name in self.sources if has_head else self._wanted():
            source, shape = self.sources[name], self.shapes[name]
            tensor = join([found[n] for n in source.names])
            if source.grouped:
                tensor = order_heads(tensor, *heads, grouped=False)
            ours[name] = tensor.span(source.part * prod(shape), shape) if source.of > 1 else tensor
        return ours

    def to_hf(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The tensors of a file for our weights, which may be spelled as in 0.5 (`attn.attn`).

        Raises:
            ValueError: A weight is unknown, missing, or not of the shape that the config gives it; or, once it is read,
                the embedding is not the same as a head that the config ties to it.
        """
        heads = self.config.n_head, self.config.n_query_groups
        ours = dict(tensors)
        for name in [name for name in tensors if ".attn.attn." in name]:
            ours[name.replace(".attn.attn.", ".attn.qkv.")] = order_heads(ours.pop(name), *heads, grouped=False)
        self._check_names(ours, self.shapes, self._wanted())
        _check_shapes(ours, self.shapes, self.config)
        if self.optional & ours.keys() and ours[HEAD] is not ours[EMBEDDING]:
            complaint = (
                f"{HEAD} and {EMBEDDING} differ, but are one in the file; set tie_embeddings: false in the config"
            )
            ours[EMBEDDING] = same(ours[EMBEDDING], ours[HEAD], complaint)
        parts: dict[str, list[LazyTensor]] = defaultdict(list)  # the parts of one tensor are in order in the model too
        for name in self._wanted():
            source, tensor, begin = self.sources[name], ours[name], 0
            if source.grouped:
                tensor = order_heads(tensor, *heads, grouped=True)
            for file_name, shape in self._file_shapes(name):
                parts[file_name].append(tensor.span(begin, shape) if len(source.names) > 1 else tensor)
                begin += prod(shape)
        return {name: join(pieces) for name, pieces in parts.items()}

    def _wanted(self) -> list[str]:
        return [name for name in self.sources if name not in self.optional]

    def _file_shapes(self, name: str) -> Iterator[tuple[str, Shape]]:
        source, (n_rows, *rest) = self.sources[name], self.shapes[name]
        n_kv = self.config.n_query_groups * self.config.head_size
        sizes = [n_rows * source.of] if len(source.names) == 1 else [n_rows - 2 * n_kv, n_kv, n_kv]
        return ((n, (size, *rest)) for n, size in zip(source.names, sizes, strict=True))

    def _recognise(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """What the model needs of a file, by the names of the table; says what is left out, refuses all else."""
        known = {n for source in self.sources.values() for n in source.names}
        found: dict[str, LazyTensor] = {}
        unknown, left_out = [], Counter()
        extra_layers = tuple(name.partition("eh_proj.")[0] for name in tensors if ".eh_proj." in name)
        for name, tensor in tensors.items():
            spelled = next((s for s in self.spellings(name) if s in known), None)
            if spelled in found:
                raise ValueError(f"`{spelled}` is there twice, also as `{name}`; delete one of the weight files")
            if spelled is not None:
                found[spelled] = tensor
            elif self.table.has_next_token_layers and name.startswith(extra_layers):
                left_out["layers that predict several tokens at once"] += 1
            elif skip := self.table.skips(name):
                left_out[skip.notice] += 1
            else:
                unknown.append(name)
        needed = [n for name in self._wanted() for n in self.sources[name].names]
        self._check_names(dict.fromkeys([*found, *unknown]), known, needed, tensors)
        for notice in filter(None, left_out):
            warnings.warn(f"{left_out[notice]} tensors of the weights are left out: {notice}", stacklevel=3)
        return found

    def spellings(self, name: str) -> Iterator[str]:
        """`name` and what it can mean: the text part of a larger model, a model without head, another spelling."""
        text = TEXT_PART.sub("", name)
        for spelling in (name, text, f"{self.table.layers.partition('.')[0]}.{text}"):
            yield spelling
            yield reduce(lambda said, pair: re.sub(*pair, said), self.table.spellings, spelling)

    def _check_names(
        self, given: Collection[str], known: Collection[str], needed: Collection[str], names: Collection[str] = ()
    ) -> None:
        """One error for all that is unknown and missing; `names` are those of the file, where they may tell more."""
        unknown = [name for name in given if name not in known]
        missing = [name for name in dict.fromkeys(needed) if name not in given]
        if not unknown and not missing:
            return
        patterns = {NUMBER.sub("{}", name): name for name in known}
        faults = []
        for name in unknown[:3]:
            pattern = NUMBER.sub("{}", name)
            near = nearest(pattern, patterns)
            why = f"nearest: `{near[0]}`" if near else "nothing is called like it"
            if pattern in patterns:
                why = f"beyond the {self.config.n_layer} layers and {self.config.n_expert} experts of the config"
            faults.append(f"`{name}` is unknown ({why})")
        faults += [f"{len(unknown) - 3} more are"] if len(unknown) > 3 else []
        faults += [f"missing: {some(missing)}"] if missing else []
        modules = {module_pattern(TEXT_PART.sub("model.", name)) for name in names if self.table.skips(name) is None}
        kinds = [kind for kind, table in WEIGHT_MAPS.items() if modules <= table.modules()]
        if kinds and self.model_type not in kinds:
            faults.append(f"the names are those of {' or '.join(kinds[:4])}: take a config of that")
        if self.sources[HEAD].names[0] in missing:
            faults.append("if the head is the embedding, the config needs tie_embeddings: true")
        model = f"{self.model_type} model {self.config.name}".strip()
        raise ValueError(f"the weights are not those of the {model}: {'; '.join(faults)}")


def _check_shapes(tensors: Mapping[str, LazyTensor], expected: Mapping[str, Shape], config: Config) -> None:
    wrong = [f"`{n}` {tuple(t.shape)} not {expected[n]}" for n, t in tensors.items() if tuple(t.shape) != expected[n]]
    if wrong:
        raise ValueError(
            f"the weights have other sizes than the config {config.name}: {some(wrong, 3)}; take the config that they "
            "came with"
        )


def lit_shapes(config: Config) -> dict[str, Shape]:
    """Names and shapes of the state dict of a `GPT`, without building all of its layers."""
    sample = copy.copy(config)
    n_dense = config.first_k_dense_replace or 0
    sample.n_layer = min(config.n_layer, n_dense + 1)  # layers of one kind are alike
    with meta_device():
        state = GPT(sample).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    last = f"transformer.h.{sample.n_layer - 1}."
    layer = {name.removeprefix(last): shape for name, shape in shapes.items() if name.startswith(last)}
    more = range(sample.n_layer, config.n_layer)
    return shapes | {f"transformer.h.{i}.{name}": shape for i in more for name, shape in layer.items()}
