"""Chat templates: a checkpoint's own Jinja program that writes a conversation as text.

A template comes from strangers. It runs in jinja2's immutable sandbox, on plain data only, and what Jinja leaves
unbounded is bounded here: the template is rewritten so that each loop pass, call, filter, operator and list goes
through a meter. How many such steps a rendering has, and how many characters and entries all that it makes may add up
to, is in proportion to the conversation and the template, so that one without end is found out at once; up to TOTAL,
and SIZE for any one value. It also ends after SECONDS, at the next step. There is no process to kill, so one step is
never interrupted: the largest, such as sorting SIZE entries, may take seconds longer.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Literal

try:
    import jinja2
except ImportError:
    raise ImportError("[chat] chat templates need jinja2: pip install 'pyllm[chat]'") from None
from jinja2 import ext, nodes
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2.0
SIZE = 1 << 22
TOTAL = 1 << 27
_STEPS, _MADE = 4096, 1 << 16  # steps of any rendering, and what it may make
_STEPS_EACH, _MADE_EACH = 64, 256  # and more of both for each character and entry of the conversation
_SOURCE = 1 << 16  # characters of a template
_DEPTH, _LOOPS = 64, 16  # of lists in lists, of loops in loops

_STRING = frozenset(
    """strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith upper lower title capitalize
    swapcase casefold replace join find rfind index rindex count removeprefix removesuffix isdigit isdecimal isnumeric
    isalpha isalnum isspace isupper islower istitle isascii isidentifier""".split()  # noqa: SIM905
)
_METHODS: dict[type, frozenset[str]] = {
    str: _STRING,
    dict: frozenset(("get", "items", "keys", "values", "copy")),
    list: frozenset(("index", "count", "copy")),
    tuple: frozenset(("index", "count")),
    int: frozenset(),
    float: frozenset(),
}
_FILTERS = """abs capitalize count d default dictsort e escape first float groupby indent int items join last length
    list lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum title trim
    truncate unique upper""".split()  # noqa: SIM905


class ChatTemplateError(ValueError):
    """A chat template that is malformed, refuses the conversation, or exceeds its limits."""


class _Meter:
    def __init__(self) -> None:
        self.end = time.monotonic() + SECONDS
        self.steps = self.left = self.total = TOTAL

    def allow(self, size: int, template: int) -> None:
        """For a conversation of so many characters and entries, and a template of so many characters."""
        self.steps = min(TOTAL, _STEPS + _STEPS_EACH * size + template)
        self.left = self.total = min(TOTAL, _MADE + _MADE_EACH * size + 32 * template)

    def charge(self, amount: int) -> None:
        if amount > SIZE:
            raise ChatTemplateError(f"[chat] a value has more than {SIZE} characters or entries")
        self.left -= amount
        if self.left < 0:
            raise ChatTemplateError(f"[chat] the values have more than {self.total} characters or entries together")
        self.steps -= 1
        if self.steps < 0:
            raise ChatTemplateError("[chat] the template has no end, or takes far too many steps for this conversation")
        if time.monotonic() > self.end:
            raise ChatTemplateError(f"[chat] the template ran for more than {SECONDS} seconds")

    def check(self, value: Any) -> Any:
        """Charges for a value that was made, after a look at all that hangs on it."""
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.charge(len(value))
            self.measure(value)
        elif isinstance(value, int):
            self.charge(value.bit_length())
            if value.bit_length() > 4096:
                raise ChatTemplateError("[chat] a number has more than 4096 bits")
        else:
            self.charge(0)
        return value

    def measure(self, value: Any) -> int:
        """The characters and entries of a value, shared ones as often as they are met."""
        size, rest = 0, [(value, 0)]
        while rest:
            value, depth = rest.pop()
            if depth > _DEPTH:
                raise ChatTemplateError(f"[chat] a value is nested more than {_DEPTH} deep")
            if isinstance(value, dict):
                self.charge(0)
                entries: Sequence = [x for item in value.items() for x in item]
            elif isinstance(value, (list, tuple)):
                self.charge(0)
                entries = value
            else:
                entries = ()
            size += 1 + (len(value) if isinstance(value, str) else len(entries))
            if size > min(SIZE, self.left):
                raise ChatTemplateError(f"[chat] a value has more than {min(SIZE, self.left)} characters or entries")
            rest += [(entry, depth + 1) for entry in entries]
        return size


_METER: ContextVar[_Meter] = ContextVar("meter")


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(ext.Extension):
    """{% generation %} marks what an assistant says, for training; the text is as without it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, cache_size=0, finalize=_finalize,
                         extensions=[_Generation, "jinja2.ext.loopcontrols"])  # fmt: skip
        own: dict[str, Callable] = {"join": _join(self.filters["join"]), "replace": _replace, "indent": _indent,
                                    "round": _round, "string": _string, "sum": _sum, "tojson": _to_json}  # fmt: skip
        filters = {name: self.filters[name] for name in _FILTERS} | own
        self.filters = {name: _metered(f) for name, f in filters.items()}
        self.globals = {"range": self.globals["range"], "namespace": _Namespace, "dict": _dict,
                        "raise_exception": _raise_exception, "strftime_now": _strftime_now}  # fmt: skip

    def tick(self, amount: int) -> None:
        """What each pass of a loop and each call of a macro begins with; amount: the fixed text in it."""
        _METER.get().charge(amount)

    def made(self, value: Any) -> Any:
        return _METER.get().check(value)

    def joined(self, *values: Any) -> str:
        return "".join([_string(value) for value in values])

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        meter.charge(0)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            args = (list(args[0]),)
            meter.charge(meter.measure(args[0]) + len(owner) * len(args[0]))
        if isinstance(owner, str) and name == "replace" and len(args) > 1:
            _check_replace(owner, *args[:2])
        return meter.check(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _METER.get()
        meter.charge(0)
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                    meter.charge(len(many) * max(times, 0))
        if operator == "%" and isinstance(left, str):
            raise ChatTemplateError("[chat] % is for numbers only")
        if operator == "**" and not (abs(left) < 1 << 64 and abs(right) <= 64):
            raise ChatTemplateError("[chat] ** is for small numbers only")
        return meter.check(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        """str.format is left out, for its widths have no bound."""
        return _no_format if getattr(value, "__name__", "") in ("format", "format_map") else None

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)


def render(template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True,
           tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any) -> str:  # fmt: skip
    """The text of a conversation.

    Args:
        template: the Jinja program; it sees all other arguments under their names, and range, namespace, dict,
            raise_exception(message) and strftime_now(format), as in transformers.
        messages: each with its "role" and "content"; plain data: strings, numbers, lists, dicts.
        add_generation_prompt: whether the text ends where the assistant is to go on.
        tools: descriptions of functions that the model may call.
        variables: more of them, such as bos_token.

    Raises:
        ChatTemplateError: the template is malformed, raises an exception, or exceeds its limits.
        TypeError: an argument holds something else than plain data.
    """
    data = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
    data = {name: _plain(value, name) for name, value in (data | variables).items()}
    meter = _Meter()
    token = _METER.set(meter)
    try:
        meter.allow(meter.measure(data), len(template))
        return _rendered(_compile(template), data)
    except ChatTemplateError:
        raise
    except Exception as e:  # a template may raise any of Python's
        raise ChatTemplateError(f"[chat] the template failed: {' '.join(str(e).split()) or type(e).__name__}") from None
    finally:
        _METER.reset(token)


def _rendered(template: jinja2.Template, data: dict[str, Any]) -> str:
    pieces, size = [], 0
    for piece in template.generate(data):
        size += len(piece)
        _METER.get().charge(0)
        if size > SIZE:
            raise ChatTemplateError(f"[chat] the text has more than {SIZE} characters")
        pieces.append(piece)
    return "".join(pieces)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    if len(source) > _SOURCE:
        raise ChatTemplateError(f"[chat] a template may have {_SOURCE} characters, but this one has {len(source)}")
    environment = _Environment()
    try:
        tree = _metered_tree(environment.parse(source))
        return jinja2.Template.from_code(environment, environment.compile(tree), dict(environment.globals))
    except jinja2.TemplateSyntaxError as e:
        raise ChatTemplateError(f"[chat] the template is malformed in line {e.lineno}: {e.message}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        what = str(e).split("\n")[0] or type(e).__name__
        raise ChatTemplateError(f"[chat] the template is malformed: {what}") from None


def _metered_tree(node: Any, loops: int = 0) -> Any:
    """Rewrites what makes values or repeats work; children first. It is inside of so many loops."""
    loops += isinstance(node, nodes.For)
    if loops > _LOOPS:
        raise ValueError(f"loops are nested more than {_LOOPS} deep")
    for field, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, field, [_metered_tree(v, loops) if isinstance(v, nodes.Node) else v for v in value])
        elif isinstance(value, nodes.Node):
            setattr(node, field, _metered_tree(value, loops))
    if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
        size = sum(len(text.data) for part in node.body for text in _texts(part))
        tick = _call("tick", [nodes.Const(size)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
    elif isinstance(node, nodes.Concat):
        return _call("joined", node.nodes, node.lineno)
    elif isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _call("made", [node], node.lineno) if node.items else node
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _call("made", [node], node.lineno)
    return node


def _texts(node: nodes.Node) -> list[nodes.TemplateData]:
    return [node] if isinstance(node, nodes.TemplateData) else list(node.find_all(nodes.TemplateData))


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Expr:
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, arguments, [], None, None, lineno=line)


def _metered(f: Callable) -> Callable:
    @functools.wraps(f)  # also what tells Jinja to pass the context
    def metered(*args: Any, **kwargs: Any) -> Any:
        _METER.get().charge(0)
        return _METER.get().check(f(*args, **kwargs))

    return metered


@jinja2.pass_context
def _finalize(context: Any, value: Any) -> str:
    return _METER.get().check(_string(value))


def _string(value: Any) -> str:
    if isinstance(value, (list, tuple, dict)):
        _METER.get().measure(value)
    return value if isinstance(value, str) else str(value)


def _join(original: Callable) -> Callable:
    @functools.wraps(original)
    def join(eval_ctx: Any, value: Any, d: str = "", attribute: Any = None) -> str:
        meter = _METER.get()
        value = list(value)
        meter.charge(meter.measure(value) + len(d) * len(value))
        return original(eval_ctx, value, d, attribute)

    return join


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        _METER.get().charge(text.count(old) * len(new))


def _replace(value: Any, old: str, new: str, count: int = -1) -> str:
    text = _string(value)
    _check_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    prefix = width if isinstance(width, str) else " " * min(width, SIZE)
    first_line, *lines = (_string(value) + "\n").splitlines()
    _METER.get().charge(len(prefix) * (len(lines) + 1))
    lines = [prefix + line if line or blank else line for line in lines]
    return "\n".join([(prefix if first else "") + first_line, *lines])


def _round(value: float, precision: int = 0, method: Literal["common", "ceil", "floor"] = "common") -> float:
    if abs(precision) > 30:
        raise ChatTemplateError("[chat] round is for at most 30 digits")
    return jinja2.filters.do_round(value, precision, method)


def _sum(value: Any, start: float = 0) -> float:
    numbers = list(value)
    if not all(isinstance(x, (int, float)) for x in (start, *numbers)):
        raise ChatTemplateError("[chat] sum is for numbers only")
    return sum(numbers, start)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
             sort_keys: bool = False) -> str:  # fmt: skip
    size = _METER.get().measure(value)
    if indent is not None:
        width = indent if isinstance(indent, int) else len(indent)
        _METER.get().charge(max(width, 0) * size)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(f"[chat] the template refuses the conversation: {' '.join(_string(message).split())}")


def _strftime_now(format: str) -> str:
    if len(format) > 200 or re.search(r"%[^A-Za-z%]*[0-9]", format):
        raise ChatTemplateError(f"[chat] {format[:80]!r} is no format of a time")
    return datetime.now().strftime(format)


def _no_format(*args: Any, **kwargs: Any) -> None:
    raise ChatTemplateError("[chat] format is not there for templates; use ~")


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise ChatTemplateError(f"[chat] a namespace can have no {name!r}")


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    if depth > _DEPTH:
        raise TypeError(f"[chat] {where} is nested more than {_DEPTH} deep")
    if isinstance(value, Mapping):
        return {_plain(k, where, depth + 1): _plain(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, where, depth + 1) for v in value]
    if value is None or isinstance(value, (str, int, float, bool, Undefined)):
        return value
    raise TypeError(f"[chat] {where} must be plain data, but holds a {type(value).__name__}")
