"""Runs chat templates, which come with models and so from strangers, in bounded time and memory.

Jinja's sandbox keeps a template away from Python's internals. It does not stop one from looping for ever or from
building a string of a terabyte, and a thread cannot be interrupted from outside. So the compiled template itself checks
a clock: a step is counted at the start of every block (the body of a loop, of a branch, of a macro) and at every call,
filter and operator, and what could grow in one step is measured before it is built.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from aios_model.tokenizer.template_compiler import GenerationBlock, MeteredCode


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template ran too long or built too much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateLimits:
    """What one rendering may use.

    Attributes:
        cpu_seconds: Processor time of the rendering thread, so that waiting for others does not count.
        num_chars: Characters of the output, and of any one value on the way to it (with 1 per item of a list).
    """

    cpu_seconds: float = 0.5
    num_chars: int = 16 * 2**20


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it (`transformers` defines how), with limits.

    Differences: attributes that Jinja deems unsafe raise at once instead of reading as undefined, and a few globals and
    filters that no template needs are missing because they produce text without bound or at random.
    """

    code_generator_class = MeteredCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        self._meter = _Meter()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
            # Constant folding would evaluate parts of the template before any limit applies.
            optimized=False,
            finalize=self.measured,
        )
        self.globals = {name: self.globals[name] for name in ("range", "cycler", "joiner")}
        self.globals |= {"dict": _make_dict, "namespace": _Namespace}
        kept = {name: function for name, function in self.filters.items() if name not in _MISSING_FILTERS}
        self.filters = {name: self.guarded(name, function) for name, function in kept.items()}

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Starts the clock for this thread; TemplateLimitError out of the block when the time is up."""
        self._meter.deadline = time.thread_time() + self._limits.cpu_seconds
        try:
            yield
        finally:
            self._meter.deadline = math.inf

    def step(self, cost: int = 1) -> None:
        """Counts work, and looks at the clock now and then: reading it takes longer than counting."""
        meter = self._meter
        meter.credit -= cost
        if meter.credit <= 0:
            meter.credit = _STEPS_PER_LOOK
            if time.thread_time() > meter.deadline:
                raise TemplateLimitError(f"the template ran for more than {self._limits.cpu_seconds} s")

    def measured(self, value: Any) -> Any:
        """`value` itself, if it is small enough to be written out."""
        if type(value) is str and len(value) < _CHARS_PER_STEP:  # nearly always
            return value
        size = self._size(value)
        if size > self._limits.num_chars:
            raise self._too_large()
        if size > _CHARS_PER_STEP:
            self.step(size // _CHARS_PER_STEP)
        return value

    def concat(self, parts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Joins what a macro or a captured block wrote."""
        parts = list(parts)
        self._allow(sum(map(len, parts)))
        return "".join(parts)

    def concatenated(self, operands: tuple[Any, ...]) -> str:
        """The `~` operator."""
        self.step()
        return self.concat([str(self.measured(operand)) for operand in operands])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuses results that would be too large before they are computed."""
        self.step()
        if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            self._allow(len(left) + len(right))
        elif operator == "*":
            self._allow_product(left, right)
        elif operator == "**":
            self._allow_number(_bits(left) * abs(right) if isinstance(right, int) else 0)
        elif operator == "%" and isinstance(left, str):
            self._allow_format(left, "%", right if isinstance(right, (tuple, Mapping)) else (right,))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls macros, methods and globals; the arguments and the result must be small enough."""
        self.step()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, (bytes, int, float)):
            raise SecurityError(f"methods of {type(owner).__name__} are not for templates")
        for value in (*args, *kwargs.values()):
            self.measured(value)
        if isinstance(owner, str):
            args = self._allow_growth(function.__name__, owner, args, kwargs)
        return self.measured(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, sandboxed by Jinja and bounded here."""
        format_safely = super().wrap_str_format(value)
        if format_safely is None:
            return None

        def format_within_limits(*args: Any, **kwargs: Any) -> str:
            self._allow_format(value.__self__, "{", (*args, *kwargs.values()))
            return format_safely(*args, **kwargs)

        return format_within_limits

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuses what Jinja would let pass as undefined, and so as empty text."""
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")

    def guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose argument and result must be small enough."""
        # Some take the context or the environment first; their subject is then the second argument.
        num_injected = int(hasattr(function, "jinja_pass_arg"))

        @wraps(function)
        def filter_within_limits(*args: Any, **kwargs: Any) -> Any:
            injected, (subject, *rest) = args[:num_injected], args[num_injected:]
            self.step(1 + len(subject) // _ITEMS_PER_STEP if hasattr(subject, "__len__") else 1)
            if name not in _STRUCTURAL_FILTERS:
                self.measured(subject)
            rest = self._allow_growth(name, subject, tuple(rest), kwargs)
            return self.measured(function(*injected, subject, *rest, **kwargs))

        return filter_within_limits

    def _allow_growth(self, name: str, subject: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple:
        """Refuses a method or filter whose result would be too large; returns the arguments, iterators made lists."""
        if name in ("default", "d"):  # gives back its argument, whatever that is
            return args
        values = (*args, *kwargs.values())
        numbers = [abs(value) for value in values if isinstance(value, int)]
        self._allow(max(numbers, default=0))
        if isinstance(subject, str):
            others = [value for value in values if isinstance(value, str)]
            match name:
                case "replace" if len(others) >= 2:
                    self._allow(len(subject) + subject.count(others[0]) * len(others[1]))
                case "expandtabs":
                    self._allow(len(subject) + subject.count("\t") * max(numbers, default=8))
                case "indent":
                    width = max(numbers, default=4) + max(map(len, others), default=0)
                    self._allow(len(subject) + (subject.count("\n") + 1) * width)
                case "join" if args and not isinstance(args[0], str):
                    args = (list(args[0]),)
                    self._allow(self._size(args[0]) + len(subject) * len(args[0]))
                case "format":
                    self._allow_format(subject, "%", values)
                case "translate" | "encode":
                    raise SecurityError(f"str.{name} is not for templates")
        elif name == "join":
            separator = max((len(value) for value in values if isinstance(value, str)), default=0)
            self._allow(self._size(subject) * (1 + separator))
        elif name == "tojson":
            self._allow(self._size(subject) * (1 + max(numbers, default=0)))
        return args

    def _allow_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            self._allow_number(_bits(left) + _bits(right))
        for sequence, factor in ((left, right), (right, left)):
            if isinstance(factor, int) and isinstance(sequence, (str, bytes, list, tuple)):
                self._allow(self._size(sequence) * max(factor, 0))

    def _allow_format(self, template: str, sign: str, values: Iterable[Any]) -> None:
        if re.search(r"\d{6}", template):
            raise TemplateLimitError("the template formats text to a width of more than 99,999")
        items = values.values() if isinstance(values, Mapping) else values
        widest = max((abs(v) if isinstance(v, int) else self._size(v) for v in items), default=0)
        self._allow(len(template) + template.count(sign) * (widest + 100_000 * bool(re.search(r"\d{3}", template))))

    def _allow(self, size: int) -> None:
        if size > self._limits.num_chars:
            raise self._too_large()
        self.step(1 + size // _CHARS_PER_STEP)

    def _allow_number(self, num_bits: int) -> None:
        if num_bits > _MAX_BITS:
            raise TemplateLimitError(f"the template computes a number of more than {_MAX_BITS} bits")

    def _too_large(self) -> TemplateLimitError:
        return TemplateLimitError(f"the template builds a value of more than {self._limits.num_chars} characters")

    def _size(self, value: Any) -> int:
        """Characters and items of `value` as if written out; counting stops beyond the limit."""
        if isinstance(value, str):
            return len(value)
        total, num_items, pending = 0, 0, [value]
        while pending and total <= self._limits.num_chars:
            item = pending.pop()
            total += 1
            num_items += 1
            if num_items % _ITEMS_PER_STEP == 0:
                self.step(4)
            if isinstance(item, (str, bytes)):
                total += len(item)
            elif isinstance(item, int):
                total += _bits(item) // 3
            elif isinstance(item, Mapping):
                pending += item.keys()
                pending += item.values()
            elif isinstance(item, (list, tuple, set, frozenset)):
                pending += item
        return total


# A look at the thread's clock takes 0.3 µs, as much as several steps.
_STEPS_PER_LOOK = 16
_CHARS_PER_STEP = 1 << 14
_ITEMS_PER_STEP = 1 << 6
_MAX_BITS = 1024

_MISSING_FILTERS = frozenset({"center", "filesizeformat", "pprint", "random", "urlize", "wordwrap", "xmlattr"})

# Filters that look at the outermost items only, so that a long conversation is not measured again at every step.
_STRUCTURAL_FILTERS = frozenset(
    {"attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map"}
    | {"max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique"}
)


class _Meter(threading.local):
    """The clock of the rendering that this thread is in; several threads render with one environment."""

    deadline = math.inf
    credit = _STEPS_PER_LOOK


class _Namespace(jinja2.utils.Namespace):
    """A namespace whose names cannot begin with an underscore, so that no Python internal can be overwritten."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_private(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names that begin with an underscore are refused")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0
