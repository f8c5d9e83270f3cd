"""Jinja templates of strangers: they see plain data, reach nothing else, and stop after a bounded amount of work.

The sandbox of Jinja keeps a template from escaping, not from computing for ever, and a thread that computes cannot be
ended from outside. So whatever a template does is paid out of a `Budget`: each turn of a loop, and the size of each
value that it makes, checked **before** the value exists where a short expression can make a long one. What is left are
steps that take time in proportion to values that are small by then, between which the clock is read.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 200_000
"""Characters of a template; those in use have up to 30,000."""

FREE_WORK = 2_000_000
WORK_PER_CHARACTER = 50
FREE_SECONDS = 1.0
SECONDS_PER_CHARACTER = 2e-6
MAX_BITS = 10_000
MAX_INDENT = 32

GROWING = {
    *("center", "ljust", "rjust", "zfill", "expandtabs", "replace", "join", "format", "format_map", "translate"),
    *("indent", "wordwrap", "batch", "slice", "tojson", "truncate", "round", "to_bytes"),
}
"""Filters and methods whose result may be longer than what they are given, at most by the factor of an argument."""

LEFT_OUT = ("pprint", "random", "striptags", "urlize", "xmlattr", "filesizeformat")
"""Filters for web pages; no chat template needs them, and not all of them end in linear time."""


class TooMuchWork(Exception):
    """The template has used up its budget."""


class Refused(TemplateError):
    """The template itself refuses what it is given, by calling `raise_exception`."""


class Budget:
    """What a rendering may still spend: characters and list elements, and seconds of this thread.

    Args:
        size: Weight of the data that the template gets.
    """

    def __init__(self, size: int) -> None:
        self.work = FREE_WORK + WORK_PER_CHARACTER * size
        self.seconds = FREE_SECONDS + SECONDS_PER_CHARACTER * size
        self.wall_end, self.end = time.monotonic() + self.seconds, time.thread_time() + self.seconds

    def spend(self, amount: int) -> None:
        """Take `amount` off; raises TooMuchWork."""
        self.work -= amount
        if self.work < 0:
            raise TooMuchWork("it does too much work")
        if time.monotonic() > self.wall_end and time.thread_time() > self.end:  # the second costs more to ask for
            raise TooMuchWork(f"it takes more than {self.seconds:.0f} seconds")

    def admit(self, amount: int) -> None:
        """Refuse to make a value of up to `amount` characters if that cannot be paid; it is paid when it is made."""
        if amount > self.work:
            raise TooMuchWork("it makes a value that is too long")


def weight(value: Any, limit: int) -> int:
    """Characters and elements of a value and of all in it, each as often as it occurs; the count ends above `limit`."""
    if isinstance(value, str):
        return len(value) + 1
    total, stack = 0, [value]
    while stack and total <= limit:
        item = stack.pop()
        if isinstance(item, (str, bytes)):
            total += len(item) + 1
        elif isinstance(item, Mapping):
            total += 1 + len(item)
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))):
            total += 1 + len(item)
            stack += item
        elif isinstance(item, int):
            total += 1 + item.bit_length() // 8
        elif isinstance(item, range):
            total += 4 * len(item)
        else:
            total += 16
    return total


def depth(value: Any) -> int:
    """How deeply lists and dicts are nested."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return 1 + max(map(depth, items), default=0)


class ClosedNamespace(Namespace):
    """A namespace that shows nothing of what is in it, which may be itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        names = dict(*args[1:], **kwargs)
        for name in names:
            _check_name(name)
        Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"a namespace may not hold the name {name!r}")


class GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}` around what the assistant has said."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """The block as a call of `mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        """The text inside, between marks if they are wanted."""
        marks = self.environment.marks
        return f"{marks[0]}{caller()}{marks[1]}" if marks else caller()


class Instruments(NodeTransformer):
    """Puts the calls that spend the budget into a parsed template."""

    def _call(self, name: str, *args: nodes.Expr) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)
        return call.set_lineno(args[0].lineno if args else 1)

    def visit_For(self, node: nodes.For) -> nodes.For:
        """Each turn costs one, and the text that is always in it."""
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        tick = self._call("tick", nodes.Const(1 + text, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        """`a ~ b`, which no hook of the environment sees."""
        self.generic_visit(node)
        return self._call("join_texts", *node.nodes)

    def _measured(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        is_constant = all(isinstance(item, (nodes.Const, nodes.Pair)) for item in node.iter_child_nodes())
        is_target = getattr(node, "ctx", "load") != "load"
        return node if is_target or (is_constant and not isinstance(node, nodes.Dict)) else self._call("charge", node)

    visit_List = visit_Tuple = visit_Dict = _measured

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        """A slice is a copy."""
        self.generic_visit(node)
        return self._call("charge", node) if isinstance(node.arg, nodes.Slice) and node.ctx == "load" else node

    def visit_Operand(self, node: nodes.Operand) -> nodes.Operand:
        """`in` reads all of what it searches."""
        self.generic_visit(node)
        if node.op in ("in", "notin") and not isinstance(node.expr, (nodes.Const, nodes.List, nodes.Tuple)):
            node.expr = self._call("charge", node.expr)
        return node


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment in which chat templates are written to run: that of transformers, with a budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        self._thread = threading.local()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed before there is a budget
            extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
            finalize=pass_context(lambda context, value: self.charge(value)),
        )
        for name in LEFT_OUT:
            del self.filters[name]
        self.filters["tojson"] = tojson
        self.filters = {name: self._bounded(name, function) for name, function in self.filters.items()}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        self.globals |= {"namespace": ClosedNamespace}

    @property
    def budget(self) -> Budget:
        """That of the rendering under way in this thread."""
        return self._thread.budget

    @property
    def marks(self) -> tuple[str, str] | None:
        """What goes around generation blocks."""
        return self._thread.marks

    @contextmanager
    def spending(self, size: int, marks: tuple[str, str] | None) -> Iterator[None]:
        """Give a rendering its budget."""
        before = self._thread.__dict__.copy()
        self._thread.budget, self._thread.marks = Budget(size), marks
        try:
            yield
        finally:
            self._thread.__dict__.clear()
            self._thread.__dict__.update(before)

    def build(self, source: str) -> Template:
        """The template, ready to render.

        Raises:
            ValueError: It is too long, or no valid template. One line.
        """
        if len(source) > MAX_SOURCE:
            raise ValueError(f"the chat template has {len(source):,} characters, more than the {MAX_SOURCE:,} allowed")
        try:
            tree = Instruments().visit(self.parse(source))
            tree.set_environment(self)
            return Template.from_code(self, self.compile(tree), self.make_globals(None))
        except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
            raise ValueError(f"the chat template{line}: not valid ({one_line(error)})") from None

    def run(self, template: Template, variables: Mapping[str, Any], marks: tuple[str, str] | None = None) -> str:
        """The text of a template that `build` has made.

        Raises:
            ValueError: The template fails, refuses the data, or does too much work. One line.
        """
        variables = plain_data(variables)
        try:
            with self.spending(weight(variables, 1 << 62), marks):
                return template.render(variables)
        except TooMuchWork as error:
            raise ValueError(f"the chat template was stopped: {error}") from None
        except Refused as error:
            raise ValueError(f"the chat template refuses the conversation: {one_line(error)}") from None
        except Exception as error:  # whatever the code of a stranger runs into
            raise ValueError(f"the chat template fails: {type(error).__name__}: {one_line(error)}") from None

    def tick(self, amount: int) -> None:
        """A turn of a loop."""
        self.budget.spend(amount)

    def charge(self, value: Any) -> Any:
        """`value`, paid for."""
        self.budget.spend(weight(value, self.budget.work))
        return value

    def join_texts(self, *values: Any) -> str:
        """`a ~ b ~ c`."""
        for value in values:
            self.charge(value)
        return "".join(map(str, values))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call in a template."""
        name = getattr(obj, "__name__", "")
        if name in ("tick", "charge", "join_texts") and getattr(obj, "__self__", None) is self:
            return obj(*args)
        if name in GROWING:
            owner = getattr(obj, "__self__", getattr(getattr(obj, "__wrapped__", None), "__self__", ""))
            args = self._listed(args)
            said = {key: value for key, value in kwargs.items() if not key.startswith("_")}  # without Jinja's own
            self._admit(name, owner, args, said)
        return self.charge(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`."""
        if operator == "%" and isinstance(left, (str, bytes)):
            self._admit("format", left, right if isinstance(right, tuple) else (right,), {})
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            if bits > MAX_BITS:
                raise TooMuchWork("it computes a number that is too long")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(value, (int, float)):
                    self.budget.admit(weight(value, self.budget.work) * max(times, 0))
        elif operator == "+" and not isinstance(left, (int, float)):
            self.budget.admit(weight(left, self.budget.work) + weight(right, self.budget.work))
        return self.charge(super().call_binop(context, operator, left, right))

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays for what it makes."""
        n_before = int(hasattr(function, "jinja_pass_arg"))

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            if name in GROWING and len(args) > n_before:
                args = (*args[:n_before], *self._listed(args[n_before:]))
                self._admit(name, args[n_before], args[n_before + 1 :], kwargs)
            return self.charge(function(*args, **kwargs))

        return bounded

    def _listed(self, args: tuple) -> tuple:
        """The arguments, those that give one value after the other as lists, so that they have a weight."""
        return tuple(self.charge(list(value)) if hasattr(value, "__next__") else value for value in args)

    def _admit(self, name: str, owner: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuse a function of `GROWING` whose result may be too long."""
        limit = self.budget.work
        factor = 1
        for value in (*args, *kwargs.values()):
            factor = max(factor, abs(value) if isinstance(value, int) else weight(value, limit))
        if name.startswith("format") and isinstance(owner, str):
            factor = max([factor, *(int(digits[:9]) for digits in re.findall(r"\d+", owner))])
        if name == "tojson" and (args or kwargs):
            if factor > MAX_INDENT:
                raise TooMuchWork("it indents too far")
            factor *= depth(owner)
        if name == "round" and factor > MAX_BITS:
            raise TooMuchWork("it computes a number that is too long")
        self.budget.admit(weight(owner, limit) * factor)


def raise_exception(message: str) -> None:
    """How a template refuses a conversation."""
    raise Refused(str(message))


def strftime_now(form: str) -> str:
    """The time of day in any form."""
    return datetime.now().strftime(form)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models have seen it: Jinja's own escapes what HTML does not bear."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def plain_data(value: Any) -> Any:
    """A copy of plain types, so that a template finds no method that does anything."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item) for item in value]
    return f"<{type(value).__name__}>"


def one_line(error: BaseException) -> str:
    """The message of an error on one line, not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__
