"""Recipes: the strict, frozen settings of one stage, from a YAML file and `key=value` overrides.

A stage's settings are the keyword arguments of its program, with their types and defaults: one place, no second list.
Unknown keys and wrong types are refused with the nearest name and the way out.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from sparsekd.errors import RecipeError

# verb -> (module, function); what is callable from the command line, imported on use.
STAGES = {
    "pack": ("sparsekd.rows", "pack"),
    "repack": ("sparsekd.repack", "repack"),
    "plan": ("sparsekd.plan", "plan"),
    "capture": ("sparsekd.capture", "capture"),
    "merge": ("sparsekd.merge", "merge"),
    "misalign": ("sparsekd.misalign", "misalign"),
    "transcode": ("sparsekd.transcode", "transcode"),
    "pool": ("sparsekd.pool", "pool"),
    "adapt": ("sparsekd.adapt", "adapt"),
    "train": ("sparsekd.train", "train"),
    "evaluate": ("sparsekd.evaluate", "evaluate"),
    "tasks": ("sparsekd.tasks", "run_tasks"),
    "speculate": ("sparsekd.speculate", "speculate"),
    "judge": ("sparsekd.judge", "judge"),
    "answer": ("sparsekd.answer", "answer"),
    "reproduce": ("sparsekd.reproduce", "reproduce"),
    "demo": ("sparsekd.demo", "run_demo"),
}
# Arguments that code passes and files cannot.
_NOT_SETTINGS = {"progress", "callbacks"}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
# What transformers and others call a setting of ours.
_ELSEWHERE = {
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "gradient_accumulation_steps": "grad_accum",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "bf16": "dtype=bfloat16",
    "torch_dtype": "dtype",
    "output_dir": "out",
    "logging_steps": "log_steps",
    "save_total_limit": "keep_checkpoints",
    "dataloader_num_workers": "dataloader_workers",
    "alpha": "ce_weight",
    "rounds": "sampler.rounds",
    "k": "sampler.k",
    "temperature": "sampler.temperature",
    "block_size": "seq_len",
    "dataset": "source",
    "column": "field",
}
_WIDTH = 100  # of the page that --settings prints


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
    textual = {name for name, field in recipe_of(stage(verb)).model_fields.items() if _takes_text(field.annotation)}
    for word in overrides:
        _set(values, word, textual)
    return check(verb, values)


def check(verb: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings validated against the verb's program, with defaults filled in."""
    model = recipe_of(stage(verb))
    for name, field in model.model_fields.items():
        if isinstance(values.get(name), bool) and not _takes(field.annotation, bool):  # pydantic would read 0 or 1
            raise RecipeError(f"{verb}: {name}={_shown(values[name])} is not {_words(field.annotation)}")
    try:
        recipe = model.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError(_explain(verb, model, values, error)) from None
    return {name: getattr(recipe, name) for name in model.model_fields}


def settings_text(verb: str) -> str:
    """A verb's settings for `--settings`: name, type, default, and the meaning that its program's docstring gives."""
    function = stage(verb)
    meanings, lines = _meanings(inspect.getdoc(function) or ""), []
    for name, field in recipe_of(function).model_fields.items():
        default = "required" if field.is_required() else f"default {_shown(field.default)}"
        lines.append(f"  {name} ({_type_name(field.annotation)}, {default})".replace(", default null", ""))
        indent = " " * 6
        lines += textwrap.wrap(meanings.get(name, ""), _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def _meanings(docstring: str) -> dict[str, str]:
    """The entries of a docstring's Args section; `a, b: meaning` counts for both."""
    _, _, section = docstring.partition("Args:\n")
    section = re.split(r"\n\n(?=\S)", section)[0]
    meanings: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\S)", section):
        names, _, meaning = entry.partition(":")
        meanings |= dict.fromkeys(names.replace(",", " ").split(), " ".join(meaning.split()))
    return meanings


def _type_name(annotation: Any) -> str:
    """An annotation as a user of YAML would say it; None and code-only types are left out."""
    if annotation is Any:
        return "text or list"
    names = {str: "text", Path: "text", int: "int", float: "float", bool: "true or false", dict: "mapping"}
    if get_origin(annotation) is tuple:
        return f"list of {len(get_args(annotation))}"
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = [get_origin(part) or part for part in parts]
    return " or ".join(dict.fromkeys(names.get(kind, "list") for kind in kinds if kind is not type(None)))


def _takes(annotation: Any, kind: type) -> bool:
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return annotation is Any or kind in alternatives


def _takes_text(annotation: Any) -> bool:
    return _takes(annotation, str) or _takes(annotation, Path)


def _words(annotation: Any) -> str:
    """What would have been valid, in words."""
    return next((words for kind, words in _WORDS.items() if _takes(annotation, kind)), f"a {_type_name(annotation)}")


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value) if value != "" else "''"


def _explain(verb: str, model: type[BaseModel], values: Mapping[str, Any], error: ValidationError) -> str:
    """The first problem as one sentence."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a typo explains a missing setting
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        elsewhere = _ELSEWHERE.get(name, "")
        known = re.split(r"[.=]", elsewhere)[0] in model.model_fields
        near = [elsewhere] if known else difflib.get_close_matches(name, model.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(model.model_fields)}"
        return f"{verb} has no setting {name!r}{hint}"
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return f"{verb} needs {name}=...; sparsekd {verb} --settings lists all"
    return f"{verb}: {name}={_shown(values[name])} is not {_words(model.model_fields[name].annotation)}"


def _read_yaml(file: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_loader())
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"the recipe {file} is not text in UTF-8") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe {file} is not YAML: {_place(error)}") from None
    if not isinstance(values, dict | None):
        raise RecipeError(f"the recipe {file} holds a {type(values).__name__}; write key: value lines")
    strange = [key for key in values or {} if not isinstance(key, str)]
    if strange:
        raise RecipeError(f"the recipe {file} has the key {strange[0]!r}; keys are names of settings")
    return values or {}


def _loader() -> Any:
    """YAML 1.1 as everybody reads it: 1e-3 is a number, 10:40 is text, and a key stands once."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for number, key in enumerate(keys):
                if key in keys[:number]:
                    mark = node.value[number][0].start_mark
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", mark)
            return super().construct_mapping(node, deep)

    numbers = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float")}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in numbers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for kind, pattern in (
        ("int", r"[-+]?(0|[1-9]\d*)"),
        ("float", r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?"),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^{pattern}$"), list("-+.0123456789"))
    return Loader


def _place(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{problem}, line {mark.line + 1}" if mark else problem


def _set(values: dict[str, Any], word: str, textual: Collection[str] = ()) -> None:
    """Put `a.b=c` into nested dicts; a name in the way (sampler=top_k, then sampler.k=12) becomes its `name` entry."""
    key, equals, text = word.partition("=")
    *path, last = key.split(".")
    if not equals or not all([*path, last]):
        raise RecipeError(f"{word!r} is not key=value, such as seed=1 or sampler.rounds=50")
    value = _text(text) if not path and last in textual else scalar(text)
    for part in path:
        inner = values.get(part)
        if not isinstance(inner, dict):
            inner = {_short_name(part): inner} if isinstance(inner, str) else {}
        values[part] = inner
        values = inner
    if isinstance(values.get(last), dict) and isinstance(value, str):
        values[last][_short_name(last)] = value
    else:
        values[last] = value


def _short_name(setting: str) -> str:
    """The entry of a mapping that a bare name stands for: student=tiny is student.family=tiny."""
    return "family" if setting == "student" else "name"


def _text(text: str) -> Any:
    """The value of a setting that takes text: out=0010 keeps its zeros; lists, mappings and null are still read."""
    value = scalar(text)
    return value if value is None or isinstance(value, list | dict) else text


def scalar(text: str) -> Any:
    """A command-line value: int, float, true / false / null, a [list] or {mapping}, else the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if text.lower() in ("true", "false", "null", "none"):
        return {"true": True, "false": False}.get(text.lower())
    if text.startswith(("[", "{")):
        import yaml

        try:
            return yaml.load(text, Loader=_loader())
        except yaml.YAMLError:
            raise RecipeError(f"{text!r} is not a list such as [a, b] or a mapping such as {{k: 12}}") from None
    return text
