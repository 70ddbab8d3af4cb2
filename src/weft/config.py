"""Recipes: frozen, typed, strict. YAML file < dotted overrides; an unknown key is refused with the nearest name."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from weft.errors import ConfigError


class Config(pydantic.BaseModel):
    """Base of every recipe section."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


def load_config(schema: type[C], path: Path | str | None = None, overrides: Mapping[str, Any] | None = None) -> C:
    """Read `path` as YAML, lay dotted `overrides` (`{"adapter.rank": 8}`) over it, and validate.

    Raises:
        ConfigError: names the file, the key and the nearest known name, or the value and what was wanted.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"recipe cannot be read: {error.strerror}", where=str(path)) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}, line {mark.line + 1}" if mark else str(path)
            raise ConfigError("recipe is not valid YAML", where=where, fix=getattr(error, "problem", None)) from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError("recipe must be a mapping of keys to values", where=str(path))
        values = loaded or {}
    for dotted, value in (overrides or {}).items():
        _put(values, dotted, value)
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        raise _explain(schema, error, path, overrides or {}) from error


def parse_overrides(tokens: Sequence[str]) -> dict[str, Any]:
    """`["--adapter.rank", "8", "--resume=never"]` -> `{"adapter.rank": 8, "resume": "never"}`; values are YAML."""
    found: dict[str, Any] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or len(token) < 3:
            raise ConfigError(f"expected an override like --section.key VALUE, got {token!r}", where="command line")
        key, equals, value = token[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} needs a value", where="command line", fix=f"write --{key} VALUE")
            value = rest.pop(0)
        try:
            found[key.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"value {value!r} of --{key} cannot be read", where="command line") from error
    return found


def to_yaml(config: Config) -> str:
    """The resolved config as a recipe, every default spelled out: saved with every result."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one value by its path; entries of a list go by their number, as in `sources.0.path`."""
    *parents, last = dotted.split(".")
    section: Any = values
    for parent in parents:
        if isinstance(section, list):
            inner = section[int(parent)] if parent.isdecimal() and int(parent) < len(section) else None
        else:
            inner = section.get(parent)
            if inner is None:
                inner = section[parent] = {}
        if not isinstance(inner, dict | list):
            raise ConfigError(f"--{dotted}: {parent} is not a section", where="command line")
        section = inner
    if isinstance(section, list):
        raise ConfigError(f"--{dotted}: {last} is to be set in a list", where="command line", fix="add .KEY")
    section[last] = value


def _explain(
    schema: type[Config], error: pydantic.ValidationError, path: Path | str | None, overrides: Mapping[str, Any]
) -> ConfigError:
    # a mistyped required key gives two errors; the typing mistake is the one to report
    first = min(error.errors(), key=lambda e: e["type"] not in ("extra_forbidden", "invalid_key"))
    location = [str(part) for part in first["loc"]]
    dotted = ".".join(location)
    where = "command line" if dotted in overrides or path is None else str(path)
    if first["type"] in ("extra_forbidden", "invalid_key"):
        known = _keys(schema, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        fix = (
            f"did you mean {'.'.join([*location[:-1], near[0]])}?"
            if near
            else f"known keys: {', '.join(sorted(known))}"
        )
        return ConfigError(f"unknown key {dotted}", where=where, fix=fix)
    if first["type"] == "missing":
        return ConfigError(f"key {dotted} is required", where=where, fix=f"add {dotted} to the recipe")
    # a check across keys belongs to the section, whose whole value would say nothing
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] != "value_error" or not isinstance(first.get("input"), dict):
        what = f"{dotted} = {first.get('input')!r}: {what}"
    return ConfigError(what, where=f"{where}, key {dotted}" if dotted else where, fix="change the value")


def _keys(schema: type[pydantic.BaseModel], location: Sequence[str]) -> list[str]:
    """The keys known at a place in the schema; unions contribute the keys of all their members."""
    level: list[type[pydantic.BaseModel]] = [schema]
    for part in location:
        inner = [_models(m.model_fields[part].annotation) for m in level if part in m.model_fields]
        # a part that names no field is the tag of a union member: stay at this level
        level = [model for models in inner for model in models] or level
    return sorted({name for model in level for name in model.model_fields})


def _models(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models(argument)]
