"""Recipes: the strict, frozen settings of one stage, from a YAML file and `key=value` overrides.

A stage's settings are the keyword arguments of its program, with their types and defaults: one place, no second list.
Unknown keys and wrong types are refused with the nearest name and the way out.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from sparsekd.errors import RecipeError

# verb -> (module, function); what is callable from the command line, imported on use.
STAGES = {
    "pack": ("sparsekd.rows", "pack"),
    "capture": ("sparsekd.capture", "capture"),
    "train": ("sparsekd.train", "train"),
    "evaluate": ("sparsekd.evaluate", "evaluate"),
}
# Arguments that code passes and files cannot.
_NOT_SETTINGS = {"progress", "callbacks"}


def stage(verb: str) -> Callable[..., Any]:
    """The program of a verb."""
    module, name = STAGES[verb]
    return getattr(importlib.import_module(module), name)


def recipe_of(function: Callable[..., Any]) -> type[BaseModel]:
    """A frozen pydantic model with one field for each keyword argument of `function`."""
    hints = get_type_hints(function)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in _NOT_SETTINGS:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (hints[name], default)
    config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)
    return create_model(f"{function.__name__.capitalize()}Recipe", __config__=config, **fields)


def read_recipe(verb: str, file: str | None, overrides: Iterable[str]) -> dict[str, Any]:
    """The settings of a verb: the YAML file's, overridden by `key=value` words, checked and complete.

    Raises:
        RecipeError: a file that cannot be read, an unknown key, a wrong type, a missing setting.
    """
    values = _read_yaml(file) if file else {}
    for word in overrides:
        _set(values, word)
    return check(verb, values)


def check(verb: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings validated against the verb's program, with defaults filled in."""
    model = recipe_of(stage(verb))
    try:
        recipe = model(**values)
    except ValidationError as error:
        raise RecipeError(_explain(verb, model, error)) from None
    return {name: getattr(recipe, name) for name in model.model_fields}


def settings_text(verb: str) -> str:
    """A verb's settings and defaults, for `--help`."""
    lines = []
    for name, field in recipe_of(stage(verb)).model_fields.items():
        default = "required" if field.is_required() else repr(field.default)
        kind = inspect.formatannotation(field.annotation).replace("typing.", "").replace("pathlib.", "")
        lines.append(f"  {name:<22} {kind:<34} {default}")
    return "\n".join(lines)


def _explain(verb: str, model: type[BaseModel], error: ValidationError) -> str:
    """The first problem as one sentence."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a typo explains a missing setting
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier())
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, model.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(model.model_fields)}"
        return f"{verb} has no setting {name!r}{hint}"
    if first["type"] == "missing":
        return f"{verb} needs {name}=...; sparsekd {verb} --settings lists all"
    wanted = inspect.formatannotation(model.model_fields[name].annotation).replace("typing.", "")
    return f"{verb}: {key}={first['input']!r} is not a valid {name} ({wanted}): {first['msg'].lower()}"


def _read_yaml(file: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise RecipeError(f"{file} holds a {type(values).__name__}, expected key: value lines")
    return values or {}


def _set(values: dict[str, Any], word: str) -> None:
    """Put `a.b=c` into nested dicts; a name in the way (sampler=top_k, then sampler.k=12) becomes its `name` entry."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise RecipeError(f"{word!r} is not key=value")
    *path, last = key.split(".")
    for part in path:
        inner = values.get(part)
        if not isinstance(inner, dict):
            inner = {} if inner is None else {"family" if part == "student" else "name": inner}
        values[part] = inner
        values = inner
    if isinstance(values.get(last), dict) and isinstance(parsed := scalar(text), str):
        values[last]["family" if last == "student" else "name"] = parsed
    else:
        values[last] = scalar(text)


def scalar(text: str) -> Any:
    """A command-line value: int, float, true / false / null, a [list] or {mapping}, else the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if text.lower() in ("true", "false", "null", "none"):
        return {"true": True, "false": False}.get(text.lower())
    if text[:1] in "[{" and text:
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            raise RecipeError(f"{text!r} is not a YAML list or mapping") from None
    return text
