"""Typed configuration: one pydantic model per job, read from YAML, overridden by dotted names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_jsonable_python

from dim.errors import ConfigError


class StrictModel(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class HowOnly:
    """In a field's ``Annotated``: it says how a program runs, and not what comes out."""


ConfigT = TypeVar("ConfigT", bound=StrictModel)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
"""The configurations that come with the package, installed or not."""

_NEARLY = 0.8  # of its letters: text_mixx is text_mix, steps is not stage


def shipped(address: str) -> str:
    """``address``; a ``configs/FILE`` that is not here is the one that comes with the package."""
    ours = address.startswith(f"{CONFIGS.name}/") and not Path(address).exists()
    return str(CONFIGS.parent / address) if ours else address


def load_config(
    cls: type[ConfigT], path: str | Path | None, overrides: Sequence[str] = ()
) -> ConfigT:
    """Read ``path`` (YAML; ``None`` = start from nothing), apply ``key.sub=value`` and validate.

    Override values are read as YAML, so ``steps=20`` is an integer and ``data=[a,b]`` a list;
    for ``path`` see :func:`shipped`.

    Raises:
        ConfigError: the file is missing or no YAML mapping, an override has no ``=``, or a key is
            unknown or has a wrong value. The message names the file and every such key.
    """
    values = {} if path is None else read_yaml(Path(path))
    for override in overrides:
        _apply_override(values, override)
    return validate_config(cls, values, where=str(path or "command line"))


def load_part(cls: type[ConfigT], path: str | Path) -> ConfigT:
    """Read from a YAML file what it has for ``cls``; its other keys are for another program.

    Raises:
        ConfigError: as for ``load_config``. A key that is nearly one of ``cls`` is a mistake.
    """
    values = read_yaml(Path(path))
    near = {
        key: value
        for key, value in values.items()
        if difflib.get_close_matches(str(key), list(cls.model_fields), n=1, cutoff=_NEARLY)
    }
    return validate_config(cls, near, where=str(path))


def validate_config(cls: type[ConfigT], values: dict[str, Any], *, where: str) -> ConfigT:
    """Build ``cls`` from ``values``; a mistake is a ``ConfigError`` naming ``where`` and key."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = "; ".join(_describe(cls, item) for item in error.errors())
        raise ConfigError(f"{where}: {lines}") from None


def dump_config(config: StrictModel) -> dict[str, Any]:
    """The resolved configuration as plain JSON types, for manifests and experiment tracking."""
    return config.model_dump(mode="json")


def what_decides(cls: type[StrictModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a dumped configuration of ``cls``, what decides the result.

    Settings that are :class:`HowOnly` are left out, and those that ``values`` does not have, for
    it was dumped before there were such, have their defaults.
    """
    chosen: dict[str, Any] = {
        name: value for name, value in values.items() if name not in cls.model_fields
    }
    for name, field in cls.model_fields.items():
        if HowOnly in field.metadata:
            continue
        if name in values:
            value = values[name]
        elif field.is_required():
            continue
        else:
            value = to_jsonable_python(field.get_default(call_default_factory=True))
        inner = _model_in(field.annotation)
        chosen[name] = what_decides(inner, value) if inner and isinstance(value, dict) else value
    return chosen


def _model_in(annotation: Any) -> type[StrictModel] | None:
    """The configuration that a field holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return annotation
    if get_origin(annotation) is dict:  # of several by name, which are compared as they are
        return None
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def suggestion(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown ``name``: the one of ``names`` that was meant."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty file holds an empty one.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        values = yaml.safe_load(Path(shipped(str(path))).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"configuration file not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read configuration file {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping at its top, not a {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(f"override {override!r} is not of the form key=value")
    *parents, leaf = name.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None


def _describe(cls: type[StrictModel], item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"]) or "the whole file"
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_suggest(cls, item['loc'])}"
    if item["type"] == "missing":
        return f"missing key {key!r}"
    return f"key {key!r}: {item['msg']} (got {item.get('input')!r})"


def _suggest(cls: type[StrictModel], location: tuple[int | str, ...]) -> str:
    model: Any = cls
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = getattr(field, "annotation", None)
    return suggestion(str(location[-1]), getattr(model, "model_fields", {}))
