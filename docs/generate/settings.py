"""The page of all settings, out of the configuration models.

What a setting means is said where it is declared: in a string below it, in a comment above or
beside it, or by name in the docstring of its model. Nothing of it is written twice.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from dim.config import StrictModel

PACKAGES = ("dim", "pipelines", "training", "serving", "workflows", "infra")

# What programs write down and read again; nobody sets it.
NOT_SETTINGS = frozenset(
    {"Counts", "EncodeOptions", "FileEntry", "FileFacts", "Maker", "Manifest", "Owner", "Plan",
     "Preparation", "Provenance", "Receipt", "Shapes"}
)  # fmt: skip

PROGRAMS = {
    "IngestConfig": "`dim data ingest`",
    "FilterPairsConfig": "`dim data filter`, of pairs",
    "FilterImagesConfig": "`dim data filter`, of images",
    "EditConfig": "`dim data edit`",
    "T2IConfig": "`dim data t2i`",
    "FeaturesConfig": "`dim data features`",
    "ExportConfig": "`dim data export`",
    "CardConfig": "`dim data card`",
    "StageConfig": "`dim train`",
    "EvaluateConfig": "`dim evaluate`",
    "ServingConfig": "`dim serve`",
    "WorkflowConfig": "`dim run`",
    "StepConfig": "a step of `dim run`",
    "RegisterConfig": "a step that is `run: register`",
    "ServeStepConfig": "a step that is `run: serve`",
    "AblationConfig": "`dim experiment ablation`",
    "RoundsConfig": "`dim experiment rounds`",
    "ModelConfig": "a model file",
    "TinyBuildConfig": "`dim tiny build`",
}

# What some names mean wherever a declaration says no more.
COMMON = {
    "accelerator_type": "Of the GPUs, as Ray calls them, such as `H100`.",
    "algorithm": "Of the signature.",
    "batch_size": "Samples, or requests, of one forward pass.",
    "cpus_per_replica": "Reserved with Ray for each replica of designer and painter.",
    "cpus_per_worker": "Reserved with Ray for each worker.",
    "designer_replicas": "Replicas of the designer that is a model of ours.",
    "experiment": "MLflow's name for runs that belong together.",
    "gpus_per_replica": "Reserved with Ray for each replica, or a part of one.",
    "gpus_per_worker": "Reserved with Ray for each worker; may be a part of one.",
    "grace_s": "How long a body may begin slowly, in seconds.",
    "higher_is_better": "Of the metric.",
    "images_per_minute": "Images let in.",
    "language": "That a text must be in.",
    **dict.fromkeys(
        (
            "max_aspect_change",
            "max_shift",
            "min_changed",
            "max_changed",
            "min_ssim",
            "min_dino",
            "min_clip",
        ),
        "For these pairs, in place of the one for all.",
    ),
    "max_batch_size": "Images, or designs, of one forward pass.",
    "max_image_pixels": "Width x height of an image that is sent, at most.",
    "max_redirects": "How often an address may lead on to another.",
    "max_request_bytes": "Size of a request's body, at most.",
    "max_steps": "Sampler steps that a request may ask for.",
    "max_words": "At most.",
    "min_words": "At least.",
    "model": "Folder of a DIM.",
    "name": "By which it is called.",
    "nsfw_label": "The label of that classifier whose probability counts.",
    "num_cpus": "Reserved with Ray for each replica.",
    "num_gpus": "Reserved with Ray for each replica.",
    "out": "Folder for everything that is made.",
    "painter_replicas": "Replicas of the painter.",
    "port": "Where it listens.",
    "replicas": "Side by side.",
    "request_timeout_s": "Until a request is given up and answered 504, in seconds.",
    "requests_per_minute": "Requests let in, or sent.",
    "seed": "Of all that is drawn at random.",
    "sha256": "Of the key; the key itself is kept nowhere.",
    "steps": "By name: what is done, see the next table.",
    "tokens_per_minute": "Of questions and answers together.",
    "uri": "MLflow's address.",
}

_INTRO = """# Every setting

Made of the configuration models by `make docs`. A setting is a key of a YAML file, and `key=value`
on the command line (`key.sub=value` within a section). A key that is not here is refused by name.
"""

_CLAUSE = re.compile(r"(?:^|[.;]\s+)((?:``\w+``(?:, | and )?)+)(?::| is| are)\s")


def page() -> str:
    """The page, in Markdown: the programs' configurations first, then the sections of these."""
    models = [model for model in all_models() if is_settings(model)]
    place = list(PROGRAMS)
    models.sort(key=lambda m: place.index(m.__name__) if m.__name__ in place else len(place))
    return "\n".join([_INTRO, *(_section(model) for model in models)])


def all_models() -> Iterator[type[StrictModel]]:
    """Every strict model of the packages, each once, in the order of their modules."""
    for package in PACKAGES:
        root = importlib.import_module(package)
        for found in pkgutil.walk_packages(root.__path__, f"{package}."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
    seen: set[type[StrictModel]] = set()
    waiting: list[type[StrictModel]] = [StrictModel]
    while waiting:
        new = [model for model in waiting.pop().__subclasses__() if model not in seen]
        seen.update(new)
        waiting.extend(new)
    ours = (model for model in seen if model.__module__.partition(".")[0] in PACKAGES)
    yield from sorted(ours, key=address)


def is_settings(model: type[StrictModel]) -> bool:
    """Whether somebody sets it."""
    return model.__name__ not in NOT_SETTINGS


def address(model: type[StrictModel]) -> str:
    """``module:Class``."""
    return f"{model.__module__}:{model.__qualname__}"


def description(model: type[StrictModel], name: str) -> str:
    """What is said of a setting where it is declared, in one line; empty: nothing."""
    for owner in model.__mro__:
        declared = name in vars(owner).get("__annotations__", {})
        if declared and (said := _beside(owner).get(name) or _in_docstring(owner).get(name)):
            return said
    return _of_section(model.model_fields[name].annotation) or COMMON.get(name, "")


def _of_section(annotation: Any) -> str:
    """The first sentence about the configuration that a field holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return _one_line(inspect.cleandoc(annotation.__doc__ or "")).partition(". ")[0]
    return next(filter(None, map(_of_section, get_args(annotation))), "")


@cache
def _beside(model: type) -> dict[str, str]:
    """Of each field that a class declares: the string below it, else comments above and beside."""
    source = inspect.getsource(model)
    lines, (definition,) = source.splitlines(), ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    said = {}
    for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            said[statement.target.id] = _one_line(
                _string(following) or _comments(lines, statement.lineno, statement.end_lineno)
            )
    return said


def _string(statement: ast.stmt | None) -> str:
    match statement:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return text
    return ""


def _comments(lines: list[str], first: int, last: int | None) -> str:
    above: list[str] = []
    for line in reversed(lines[: first - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip().removeprefix("# "))
    beside = re.search(r"  # (.+)$", lines[(last or first) - 1])
    return " ".join([*above, *([beside[1]] if beside else [])])


@cache
def _in_docstring(model: type) -> dict[str, str]:
    """What the docstring of a class says of its fields, as "``name``: this. ``other``: that."."""
    text = _one_line(inspect.cleandoc(model.__doc__ or ""))
    found = list(_CLAUSE.finditer(text))
    ends = [match.start() + 1 for match in found[1:]]
    said = {}
    for match, end in zip(found, [*ends, len(text)], strict=False):
        for name in re.findall(r"``(\w+)``", match[1]):
            said[name] = text[match.end() : end].strip()
    return said


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _section(model: type[StrictModel]) -> str:
    program = PROGRAMS.get(model.__name__)
    heading = f"{program}: {model.__name__}" if program else model.__name__
    about = _markdown(_one_line(inspect.cleandoc(model.__doc__ or "")))
    rows = [
        f"| `{name}` | {_cell(_type(field.annotation, field))} | {_cell(_default(field))} "
        f"| {_markdown(_cell(description(model, name)))} |"
        for name, field in model.model_fields.items()
    ]
    table = ["| setting | type | default | |", "| --- | --- | --- | --- |", *rows]
    anchor = address(model).replace(":", ".")
    where = f"`{model.__module__}`"
    return "\n".join([f"## {heading} {{ #{anchor} }}", "", f"{about} ({where})", "", *table, ""])


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    """A type as a reader of YAML understands it; a configuration is a link to its own table."""
    limits = _limits(field.metadata) if field else ""
    return f"{_type_name(annotation)}{limits}"


def _type_name(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return f"{_type_name(inside[0])}{_limits(inside[1:])}"
    if origin is Literal:
        return " \\| ".join(f"`{json.dumps(value)}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " \\| ".join(map(_type_name, inside))
    if origin in (list, set, frozenset, tuple):
        return f"{'list' if origin is not set else 'set'} of {_several(inside)}"
    if origin is dict:
        return f"mapping of {_type_name(inside[0])} to {_type_name(inside[1])}"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return f"[{annotation.__name__}](#{address(annotation).replace(':', '.')})"
    names = {str: "text", int: "integer", float: "number", bool: "true/false", Any: "anything"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _several(inside: tuple[Any, ...]) -> str:
    return " and ".join(dict.fromkeys(_type_name(item) for item in inside if item is not Ellipsis))


def _limits(metadata: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    said = [
        f"{sign} {getattr(item, name)}"
        for item in metadata
        for name, sign in signs.items()
        if getattr(item, name, None) is not None
    ]
    return f" {', '.join(said)}" if said else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = to_jsonable_python(
        field.get_default(call_default_factory=True, validated_data={}), fallback=str
    )
    if value is PydanticUndefined:
        return ""
    if isinstance(field.default, StrictModel) or (isinstance(value, dict) and value):
        return "its defaults"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def _markdown(text: str) -> str:
    """Docstrings' double backquotes and references as Markdown."""
    return re.sub(r":\w+:`([^`]+)`", r"`\1`", text).replace("``", "`")


if __name__ == "__main__":
    print(page())
