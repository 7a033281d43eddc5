"""The index of all messages, out of the places in the code where they are written.

Read off the syntax tree, so that it needs no import and misses no message whose text stands where
its error is made. What a text fills in is shown as "…".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("dim", "pipelines", "training", "serving", "workflows", "infra")

# What becomes an error's sentence without being a DimError: validators of settings, what a client
# is answered, a record that is rejected or failed, what the doctor finds.
ALSO = frozenset(
    {"ValueError", "PydanticCustomError", "Rejection", "Failure", "answer", "Finding",
     "NotACompletion"}
)  # fmt: skip
_BASE = "DimError"
WARNING = "warning: "  # how a line begins that tells of trouble and lets the work go on
_ROOMS = {
    "dim": "Models, designers, settings",
    "pipelines": "Data jobs",
    "training": "Training",
    "serving": "The server and its clients",
    "workflows": "Workflows and the demo",
    "infra": "Object store, MLflow, clusters",
}

_INTRO = """# Every message

Made of the places in the code where messages are written, by `make docs`: search this page for some
words of the one you have. "…" stands for what the message fills in. What to do about the most
frequent ones is on [Troubleshooting](../troubleshooting.md).
"""


@dataclass(frozen=True, order=True)
class Message:
    """``text`` as it is written in ``module`` where an error ``kind`` is made."""

    module: str
    text: str
    kind: str


def page() -> str:
    """The page, in Markdown: a table for each package."""
    found = list(all_messages())
    parts = [_INTRO]
    for package, title in _ROOMS.items():
        rows = [
            f"| {_cell(said.text)} | {_KIND.get(said.kind, said.kind)} | `{said.module}` |"
            for said in found
            if said.module.partition(".")[0] == package
        ]
        parts += [f"## {title}", "", "| message | kind | from |", "| --- | --- | --- |", *rows, ""]
    return "\n".join(parts)


_KIND = {
    "ValueError": "settings",
    "PydanticCustomError": "settings",
    "answer": "HTTP",
    "Finding": "`dim doctor`",
    "Failure": "the command line",
    "Rejection": "a record",
    "NotACompletion": "a designer's answer",
    WARNING: "what is said meanwhile",
}


def all_messages() -> Iterator[Message]:
    """Every message with a text of its own, each once, by module."""
    found = {message for path in _sources() for message in _messages(path)}
    yield from sorted(found)


def _sources() -> list[Path]:
    return sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def errors() -> frozenset[str]:
    """The names of the classes that derive from ``DimError``, by whatever others."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for path in _sources()
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ClassDef)
    }
    known = {_BASE}
    while new := {name for name, of in bases.items() if of & known} - known:
        known |= new
    return frozenset(known)


def _messages(path: Path) -> Iterator[Message]:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for node, kind in _made(_tree(path)):
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            for text in texts(argument, path):
                if says(text):
                    yield Message(module, text, kind)
    for said in _said(_tree(path)):
        for text in texts(said, path):
            if text.startswith(WARNING):
                yield Message(module, text, WARNING)


def _said(tree: ast.Module) -> Iterator[ast.expr]:
    """Every text of a file, each as a whole."""
    whole = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for text in whole for part in text.values}
    alone = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    yield from [*whole, *(node for node in alone if id(node) not in parts)]


def says(text: str) -> bool:
    """Whether somebody could look for it: it has words, or one and what is filled in."""
    words = re.findall(r"[^\W\d_]{2,}", text)
    return len(words) >= 2 or ("…" in text and any(len(word) >= 4 for word in words))


def _made(tree: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    """Every call that makes an error, also one in the error's own class, and the error's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (kind := _called(node)) in errors() | ALSO:
            yield node, kind
        if isinstance(node, ast.ClassDef) and node.name in errors():
            for inner in ast.walk(node):
                if isinstance(inner, ast.Call) and ast.unparse(inner.func) == "super().__init__":
                    yield inner, node.name


def _called(node: ast.Call) -> str:
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def texts(node: ast.expr, path: Path, *, far: bool = True) -> list[str]:
    """What an expression in a file may say.

    Constants by name and what a function returns, too. If ``far``, so is what a variable is set to
    in the function around the expression, and what that function is given in its own file.
    """
    match node:
        case ast.Constant(value=str(text)):
            return [_one_line(text)]
        case ast.JoinedStr(values=parts):
            return [_one_line("".join(_part(part) for part in parts))]
        case ast.IfExp(body=first, orelse=second):
            return [*texts(first, path, far=far), *texts(second, path, far=far)]
        case ast.BoolOp(values=values):
            return [text for value in values for text in texts(value, path, far=far)]
        case ast.BinOp(op=ast.Add(), left=first, right=second):
            left, right = (texts(each, path, far=far) or ["…"] for each in (first, second))
            return [f"{a}{b}" for a in left for b in right]
        case ast.Name(id=name) | ast.Attribute(attr=name) if name.lstrip("_").isupper():
            return [text for value, place in _constants(name) for text in texts(value, place)]
        case ast.Name() if far:
            return [text for each in _local(node, path) for text in texts(each, path, far=False)]
        case ast.Call():
            returned = _returns(path, _called(node))
            return [text for value in returned if value is not node for text in texts(value, path)]
    return []


def _constants(name: str) -> Iterator[tuple[ast.expr, Path]]:
    for path in _sources():
        for node in _tree(path).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=found)], value=ast.expr() as value):
                    if found == name:
                        yield value, path


def _local(name: ast.Name, path: Path) -> Iterator[ast.expr]:
    """What a variable is set to in the function around it, or given where that is called."""
    around = [
        node
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef) and node.lineno <= name.lineno <= _end(node)
    ]
    if not around:
        return
    inner = max(around, key=lambda node: node.lineno)
    for node in ast.walk(inner):
        match node:
            case ast.Assign(targets=[ast.Name(id=found)], value=value):
                if found == name.id:
                    yield value
    given = [
        one.arg
        for one in inner.args.posonlyargs + inner.args.args
        if one.arg not in ("self", "cls")
    ]
    for node in ast.walk(_tree(path)):
        outside = isinstance(node, ast.Call) and not inner.lineno <= node.lineno <= _end(inner)
        if outside and _called(node) == inner.name:
            places = dict(zip(given, node.args, strict=False))
            places |= {keyword.arg: keyword.value for keyword in node.keywords}
            if name.id in places:
                yield places[name.id]


def _end(node: ast.FunctionDef) -> int:
    return node.end_lineno or node.lineno


def _returns(path: Path, name: str) -> list[ast.expr]:
    """What a function of this module returns that is a text by itself."""
    return [
        inner.value
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef) and node.name == name
        for inner in ast.walk(node)
        if isinstance(inner, ast.Return) and isinstance(inner.value, ast.Constant | ast.JoinedStr)
    ]


def _part(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "…"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    """A text that Markdown shows as it is."""
    return re.sub(r"([\\|*_<>\[\]`{}$#])", r"\\\1", text)


if __name__ == "__main__":
    print(page())
