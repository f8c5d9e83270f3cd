"""Tensors that have only a size, and operations that keep for their backward pass what those of torch keep.

It is autograd without numbers: memory is in use as long as a variable, or a node of the backward pass, refers to it. So
the peak of a model follows from its code, its precision and the kernels; nothing is fitted to measurements. torch is
not imported: that alone would take longer than the whole plan.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from litgpt.config import Config

FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Setting:
    """What decides the memory of a layer besides the config of the model."""

    B: int = 1
    T: int = 1
    param_bytes: int = 4
    """Bytes of a weight, and of a number in the residual stream."""
    compute_bytes: int = 4
    """Bytes of a number inside the layers; less than `param_bytes` under autocast."""
    device: str = "cpu"
    backward: bool = False
    """Whether gradients are made."""
    trains_base: bool = True
    """Whether the model's own weights are trained."""
    holds_gradients: bool = False
    """Whether the gradients of an earlier micro batch are there to be added to."""
    quantized: bool = False
    """Whether the linear layers of the blocks have 4-bit weights, unpacked for each use."""
    lora_r: int = 0
    lora_parts: frozenset[str] = frozenset()
    """What has LoRA: query, key, value, projection, mlp, head."""
    lora_dropout: float = 0.0
    n_cached: int = 0
    """Tokens in the KV cache, those of this pass included."""

    @property
    def mixed(self) -> bool:
        """Whether autocast makes copies of weights and inputs in low precision."""
        return self.param_bytes != self.compute_bytes


@dataclass(frozen=True)
class Stage:
    """One part of the model: its bytes, beside those of its weights."""

    forward_peak: int
    saved: int = 0
    """Kept from its forward to its backward pass."""
    backward_peak: int = 0
    """In its backward pass, with what it kept and the gradients of its weights."""
    gradients: int = 0
    """Gradients of its weights, which stay."""
    casts: int = 0
    """Copies of its weights that nothing but autocast keeps, until the forward pass of the whole model ends."""


class Data:
    """Memory that is in use until the last reference to it is gone."""

    __slots__ = ("n_bytes", "run")

    def __init__(self, run: "Rehearsal", n_bytes: int) -> None:
        self.run, self.n_bytes = run, n_bytes
        run.live += n_bytes
        if run.live > run.peak:
            run.peak = run.live

    def __del__(self) -> None:
        self.run.live -= self.n_bytes


class Node:
    """A step of the backward pass: the inputs that get a gradient, and what the forward pass keeps for it."""

    __slots__ = ("inputs", "made", "passes", "saved", "scratch", "weights", "width")

    def __init__(
        self, inputs: list = (), saved: tuple = (), passes: bool = False, scratch: int = 0, weights: tuple = (),
        made: tuple = (), width: int = 0,
    ) -> None:  # fmt: skip
        self.inputs, self.saved, self.passes = inputs, saved, passes
        self.scratch, self.weights, self.made, self.width = scratch, weights, made, width


class Size:
    """A tensor of `n` numbers of `width` bytes; views share `data`. `node` made it, if a gradient flows through it."""

    __slots__ = ("data", "n", "node", "width")

    def __init__(self, n: int, width: int, data: Data, node: Node | None = None) -> None:
        self.n, self.width, self.data, self.node = n, width, data, node


class Rehearsal:
    """The engine and the operations. `shapes` gets the weights: name -> shape, and how many experts have one of it."""

    def __init__(self, setting: Setting) -> None:
        self.set = setting
        self.live = self.peak = 0
        self.nodes: list[Node] = []
        self.gradients: list[Data] = []
        self.casts: list[Data] = []
        self.shapes: dict[str, tuple[tuple[int, ...], int]] = {}

    def op(
        self, n: int, width: int, inputs: Iterable[Size], saved: Iterable[Data | None] = (), *, passes: bool = False,
        view: Data | None = None, scratch: int = 0, weights: tuple[int, ...] = (), made: tuple = (),
    ) -> Size:  # fmt: skip
        """Output of an operation, and its node where a gradient flows.

        Args:
            passes: The gradient of the output, or a part of it, serves as that of each input as wide as the output.
            view: The output is a view of this.
            scratch: Bytes that only the backward pass takes.
            weights: Numbers in each weight that is trained here.
            made: Gradients of input and weight that the forward pass has made already.
        """
        data = view or Data(self, n * width)
        sources = [(x.node, x.n, x.width) for x in inputs if x.node is not None]
        if not self.set.backward or not (sources or weights or made):
            return Size(n, width, data)
        node = Node(sources, tuple(saved), passes, scratch, weights, made, width)
        self.nodes.append(node)
        return Size(n, width, data, node)

    def backward(self, node: Node, grad: Data) -> dict[Node, Data]:
        """Goes back through all nodes. The gradients of weights stay in `gradients`, that of the input is returned."""
        grads = {node: grad}
        del grad
        while self.nodes:
            node = self.nodes.pop()
            grad = grads.pop(node, None)
            if grad is None:
                continue
            for source, n, width in node.inputs:
                part = node.made[0] if node.made else grad
                if not node.made and not (node.passes and width == node.width):
                    part = Data(self, n * width)
                grads.setdefault(source, part)  # that of a second use is added in place
                del part
            Data(self, node.scratch)
            made = [Data(self, n * min(node.width, self.set.param_bytes)) for n in node.weights]
            node.saved = grad = None
            if node.width < self.set.param_bytes:  # the gradient of a copy becomes one of the weight
                for i, n in enumerate(node.weights):
                    made[i] = Data(self, n * self.set.param_bytes)
            made += node.made[1:]
            node.made = ()
            if not self.set.holds_gradients:
                self.gradients += made
            del made
        return grads

    def stage(self, x: Size | None, layer: Callable[[Size | None], Size]) -> Stage:
        """Runs `layer` on `x`, the output of the stage before, forward and, where gradients flow, backward."""
        y = layer(x)
        forward_peak, n_out, casts = self.peak, y.n * y.width, sum(d.n_bytes for d in self.casts)
        del x
        self.casts.clear()
        if y.node is None:
            return Stage(forward_peak, casts=casts)
        saved, node = self.live - n_out, y.node
        del y
        self.peak = self.live
        rest = self.backward(node, Data(self, n_out))
        del rest
        return Stage(forward_peak, saved, self.peak, sum(d.n_bytes for d in self.gradients))

    def source(self, n: int, width: int, needs_grad: bool) -> Size:
        """The input of a stage."""
        return Size(n, width, Data(self, n * width), Node() if needs_grad and self.set.backward else None)

    # ------------------------------------------------------------ operations

    def cast(self, x: Size, width: int) -> Size:
        """`x.to(dtype)`, which is `x` itself where the dtype is the same."""
        return x if x.width == width else self.op(x.n, width, [x])

    def like(self, x: Size, *saved: Data) -> Size:
        """An elementwise operation that keeps `saved`: `()` for `x * 2`, `x.data` for `silu(x)`."""
        return self.op(x.n, x.width, [x], saved)

    def copy(self, x: Size) -> Size:
        """What `reshape` or `flatten` makes of a tensor that lies otherwise in memory."""
        return self.op(x.n, x.width, [x])

    def add(self, x: Size, y: Size) -> Size:
        """`x + y`."""
        return self.op(x.n, max(x.width, y.width), [x, y], passes=True)

    def mul(self, x: Size, y: Size) -> Size:
        """`x * y`; where `y` is smaller, it is broadcast."""
        saved = [x.data if y.node else None, y.data if x.node else None]
        scratch = x.n * x.width if y.node and y.n < x.n else 0
        return self.op(x.n, max(x.width, y.width), [x, y], saved, scratch=scratch)

    def view(self, x: Size, n: int) -> Size:
        """A part of `x`; in the backward pass the gradient gets its full size again."""
        return self.op(n, x.width, [x], view=x.data)

    def keeping(self, x: Size) -> Size:
        """An elementwise operation that keeps its output, such as tanh and softmax."""
        y = self.op(x.n, x.width, [x])
        if y.node:
            y.node.saved = (y.data,)
        return y

    def dropout(self, x: Size, p: float) -> Size:
        """Keeps a mask: booleans on CUDA, factors on the CPU."""
        if not p or not self.set.backward:
            return x
        return self.op(x.n, x.width, [x], [Data(self, x.n * (x.width if self.set.device == "cpu" else 1))])

    def linear(
        self, name: str, x: Size, n_in: int, n_out: int, bias: bool = False, n_copies: int = 1, lora: dict | None = None
    ) -> Size:
        """A linear layer; `n_copies` experts share the tokens. `lora` is what of its outputs has LoRA, in numbers."""
        is_frozen, in_block = not self.set.trains_base, "." in name
        self.shapes[f"{name}.weight"] = (n_out, n_in), n_copies
        weights = [n_out * n_in * n_copies]
        if bias:
            self.shapes[f"{name}.bias"] = (n_out,), n_copies
            weights.append(n_out * n_copies)
        given, x = x, self.cast(x, self.set.compute_bytes)
        n_tokens, weight, unpacked = x.n // n_in, None, None
        if self.set.quantized and in_block:
            unpacked = Data(self, weights[0] * self.set.compute_bytes)
        elif self.set.mixed:
            weight = Data(self, sum(weights) * self.set.compute_bytes)
            if not (is_frozen or self.set.n_cached):  # not in inference mode
                self.casts.append(weight)
        y = self.op(
            n_tokens * n_out, self.set.compute_bytes, [x], [None if is_frozen else x.data, weight if x.node else None],
            weights=() if is_frozen else tuple(weights), scratch=unpacked.n_bytes if unpacked else 0,
        )  # fmt: skip
        del weight, unpacked
        parts = {part: n for part, n in (lora or {}).items() if part in self.set.lora_parts}
        return self.add_lora(name, given, y, n_in, parts, n_copies) if parts and self.set.lora_r else y

    def add_lora(self, name: str, x: Size, y: Size, n_in: int, parts: dict[str, int], n_copies: int) -> Size:
        """`y` plus the low-rank product for the outputs in `parts`."""
        r = self.set.lora_r * len(parts)
        shapes = {f"{name}.lora_A": (r, n_in), f"{name}.lora_B": (sum(parts.values()), self.set.lora_r)}
        self.shapes |= {key: (shape, n_copies) for key, shape in shapes.items()}
        x = self.cast(self.dropout(x, self.set.lora_dropout), self.set.compute_bytes)
        n_tokens = x.n // n_in
        a = self.op(n_tokens * r, x.width, [x], [x.data], weights=(r * n_in * n_copies,))
        n_out = sum(parts.values())
        delta = self.op(n_tokens * n_out, x.width, [a], [a.data], weights=(n_out * self.set.lora_r * n_copies,))
        delta = self.like(delta)
        return self.add(y, delta if delta.n == y.n else self.op(y.n, y.width, [delta]))

    def norm(self, name: str, x: Size, n: int, config: Config, kind: str | None = None) -> Size:
        """RMSNorm or LayerNorm over the last `n` numbers."""
        trains, rows = self.set.trains_base, x.n // n
        weights = tuple([n] * (trains and config.norm_affine))
        if config.norm_affine:
            self.shapes[f"{name}.weight"] = (n,), 1
        if (kind or config.norm_class_name) == "LayerNorm":
            if config.norm_affine:
                self.shapes[f"{name}.bias"] = (n,), 1
            stats = Data(self, 2 * rows * FLOAT)
            return self.op(x.n, x.width, [x], [x.data, stats], weights=weights * 2)
        wide = Data(self, x.n * FLOAT if x.width < FLOAT else 0)
        root = Data(self, rows * FLOAT)
        products = Data(self, 2 * x.n * FLOAT - (x.n * FLOAT if x.width == FLOAT else 0))
        scratch = 4 * x.n * FLOAT - x.n * x.width
        y = self.op(x.n, x.width, [x], [x.data, root], weights=weights, scratch=scratch)
        del products, wide, root
        return y

    def rotate(self, x: Size, n_rotated: int, n_last: int, tables: tuple[Data, Data]) -> Size:
        """RoPE on `n_rotated` of the `n_last` numbers of each head."""
        products = Data(self, x.n * n_rotated // n_last * x.width)  # both halves, before they are joined
        y = self.op(x.n, x.width, [x], tables, scratch=products.n_bytes + x.n * x.width)
        del products
        return y
