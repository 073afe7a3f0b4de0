"""Instruction-following test sets as one list of prompts with references (paper, appendix E.3).

    prompts = load_prompts("dolly/valid.jsonl")          # 500 of them in the paper
    prompts = load_prompts("sinst.jsonl", kind="sni")    # references longer than 11 words

Five shapes of JSON lines are known: `READERS` lists them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checks import check_at_least, check_seed
from .errors import RecipeError, SourceError
from .files import canonical_json, read_file
from .order import permute
from .sources import missing

Record = dict[str, Any]

# The paper keeps pairs of these two sets "whose ground-truth response length is longer than 11".
MIN_RESPONSE_WORDS = {"sni": 12, "unni": 12}
# UnNI writes this where an instruction has no constraint.
_NO_CONSTRAINT = {"none", "none."}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One thing to ask a model.

    Attributes:
        id: the line in its file, and the instance on that line where one holds several: "17" or "17.2".
        prompt: the instruction and its input, set apart by a blank line.
        reference: the ground-truth response; None where the set has none.
    """

    id: str
    prompt: str
    reference: str | None


def load_prompts(
    path: str | Path,
    *,
    kind: str = "auto",
    min_response_words: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """The prompts of a JSON-lines file, in the order of the file.

    The paper does not say in which unit it measured "longer than 11". Words are counted here, separated by white
    space: tokens would make the test set depend on the tokenizer of the model under test, so that two students
    would not be asked the same questions.

    Args:
        path: a local file or an fsspec URL.
        kind: one of `READERS`, or "auto": what the first record's fields plainly are. SelfInst's and UnNI's flat
            records look alike; as their filters differ, "auto" takes them only with `min_response_words`.
        min_response_words: the fewest words of a reference that is kept; default: 12 ("longer than 11") for sni and
            unni, no filter for the others.
        limit: draw this many of what the filter leaves, without replacement; the choice is a function of the seed.
        seed: of that choice.

    Raises:
        SourceError: a file that is missing or no JSON lines, a record of another shape, an empty reference, or
            nothing left by the filter; the message has the line and the fields it found.
        RecipeError: an unknown kind, or a number out of range.
    """
    check_at_least(0, min_response_words=min_response_words)
    check_at_least(1, limit=limit)
    check_seed(seed)
    if kind not in ("auto", *READERS):
        raise RecipeError(f"kind={kind!r} is not one of auto, {', '.join(READERS)}")
    records = list(_records(path))
    if kind == "auto":
        kind = _kind_of(records[0][1], f"{path}:{records[0][0]}", told_apart=min_response_words is None)
    prompts = [prompt for number, record in records for prompt in _prompts(kind, record, path, number)]
    least = MIN_RESPONSE_WORDS.get(kind, 0) if min_response_words is None else min_response_words
    return _draw(_long_enough(prompts, least, path), limit, seed)


def digest(prompts: Sequence[Prompt]) -> str:
    """sha256 (hex) of the prompts, their references and their order."""
    return hashlib.sha256(canonical_json([[p.id, p.prompt, p.reference] for p in prompts])).hexdigest()


def item_number(*names: str | int) -> int:
    """The 63-bit number by which draws tell items apart, from the names that identify one in its test set."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:8], "big") >> 1


def words(text: str) -> int:
    """How many words a text has: stretches without white space."""
    return len(text.split())


# -- which prompts


def _long_enough(prompts: list[Prompt], least: int, path: str | Path) -> list[Prompt]:
    kept = []
    for prompt in prompts:
        if least and prompt.reference is None:
            raise SourceError(f"{path}:{prompt.id} has no reference to measure; leave min_response_words out")
        if prompt.reference is not None and words(prompt.reference) < least:
            continue
        if prompt.reference is not None and not prompt.reference.strip():
            raise SourceError(f"{path}:{prompt.id} has an empty reference, which nobody can rate; leave the record out")
        kept.append(prompt)
    if not kept:
        raise SourceError(
            f"{path}: none of {len(prompts)} references has {least} words; lower min_response_words={least}"
        )
    return kept


def _draw(prompts: list[Prompt], limit: int | None, seed: int) -> list[Prompt]:
    if limit is None or limit >= len(prompts):
        return prompts
    chosen = permute(np.arange(limit), len(prompts), seed)
    return [prompts[index] for index in sorted(chosen.tolist())]


# -- lines -> records


def _records(path: str | Path) -> Iterator[tuple[int, Record]]:
    """(line number from 1, record) of each line that is not blank."""
    found = False
    for number, raw in enumerate(_content(path).split(b"\n"), 1):
        if raw.strip():
            found = True
            yield number, _record(raw, f"{path}:{number}")
    if not found:
        raise SourceError(f"{path} holds no record; give JSON lines, one record each")


def _content(path: str | Path) -> bytes:
    try:
        return read_file(path).removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise SourceError(missing(Path(path))) from None


def _record(raw: bytes, where: str) -> Record:
    try:
        record = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where} is not JSON ({error}); each line is one record, a JSON array is not read") from None
    if not isinstance(record, dict):
        raise SourceError(f"{where} is a JSON {type(record).__name__}, not a record with named fields")
    return record


# -- records -> prompts


def _kind_of(record: Record, where: str, *, told_apart: bool) -> str:
    """The first kind whose fields are there; flat SelfInst and UnNI records need no telling apart under one filter."""
    fields = set(record)
    if {"definition", "inputs", "targets"} <= fields:
        return "sni"
    if {"instruction", "instances"} <= fields:
        first = record["instances"][:1] if isinstance(record["instances"], list) else []
        marks = {"constraints", "instruction_with_input"}
        return "unni" if first and isinstance(first[0], dict) and marks & set(first[0]) else "selfinst"
    if {"instruction", "output"} <= fields and "response" not in fields:
        if told_apart:
            raise SourceError(
                f"{where} can be SelfInst or UnNI, of which only UnNI is filtered by length; "
                "say which: kind=selfinst or kind=unni"
            )
        return "selfinst"
    if {"instruction", "response"} <= fields:
        return "dolly"
    if {"text", "turns"} & fields:
        return "vicuna"
    raise SourceError(f"{where} {_has(record)}, which is no known shape; give kind= one of {', '.join(READERS)}")


def _prompts(kind: str, record: Record, path: str | Path, number: int) -> list[Prompt]:
    where = f"{path}:{number}"
    pairs = READERS[kind](record, where)
    several = len(pairs) > 1
    return [
        Prompt(id=f"{number}.{index}" if several else str(number), prompt=prompt, reference=reference)
        for index, (prompt, reference) in enumerate(pairs)
        if _not_empty(prompt, where)
    ]


def _not_empty(prompt: str, where: str) -> bool:
    if not prompt:
        raise SourceError(f"{where} has an empty prompt; repair the record or leave it out")
    return True


Pair = tuple[str, str | None]


def _dolly(record: Record, where: str) -> list[Pair]:
    """instruction, context (may be empty or absent), response."""
    parts = [_text(record, "instruction", where), _optional(record, "context", where)]
    return [(_join(parts), _text(record, "response", where))]


def _instances(record: Record, where: str) -> list[Pair]:
    """instruction with input and output, or with a list `instances` of those; UnNI's constraints join the prompt."""
    instruction = _text(record, "instruction", where)
    if "instances" not in record:
        return [_instance(instruction, record, where)]
    instances = record["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(each, dict) for each in instances):
        raise SourceError(f"{where}: field 'instances' is no list of records; each needs input and output")
    return [_instance(instruction, each, f"{where}: instance {index}") for index, each in enumerate(instances)]


def _instance(instruction: str, record: Record, where: str) -> Pair:
    constraints = _optional(record, "constraints", where)
    parts = [instruction, _optional(record, "input", where)]
    parts += [] if constraints.strip().lower() in _NO_CONSTRAINT else [constraints]
    return _join(parts), _first(record, "output", where)


def _sni(record: Record, where: str) -> list[Pair]:
    """definition, inputs, targets: one input and its right targets, of which the first counts, or as many of each."""
    definition = _first(record, "definition", where)
    inputs = _get(record, "inputs", where)
    if not isinstance(inputs, list):
        return [(_join([definition, _text(record, "inputs", where)]), _first(record, "targets", where))]
    targets = _get(record, "targets", where)
    if not isinstance(targets, list) or len(targets) != len(inputs):
        count = len(targets) if isinstance(targets, list) else 1
        raise SourceError(f"{where} has {len(inputs)} inputs and {count} targets; give as many of one as of the other")
    pairs = [{"inputs": each, "targets": target} for each, target in zip(inputs, targets, strict=True)]
    return [pair for each in pairs for pair in _sni({"definition": definition} | each, where)]


def _vicuna(record: Record, where: str) -> list[Pair]:
    """text, or turns with one turn; the reference, if any, in reference, response or output."""
    field = "turns" if "turns" in record else "text"
    turns = _get(record, field, where)
    if isinstance(turns, list) and len(turns) > 1:
        raise SourceError(f"{where} has {len(turns)} turns; a judge here rates single answers: keep the first turn")
    answer = next((name for name in ("reference", "response", "output") if record.get(name) not in (None, [])), None)
    return [(_join([_first(record, field, where)]), _first(record, answer, where) if answer else None)]


# kind -> how a record becomes (prompt, reference) pairs
READERS: dict[str, Callable[[Record, str], list[Pair]]] = {
    "dolly": _dolly,
    "selfinst": _instances,
    "vicuna": _vicuna,
    "sni": _sni,
    "unni": _instances,
}


# -- fields


def _join(parts: Sequence[str]) -> str:
    """As `sparsekd pack` joins an instruction with its input, so that a student is asked as it was taught."""
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _has(record: Record) -> str:
    return f"has the fields {', '.join(map(repr, record)) or 'none'}"


def _get(record: Record, name: str, where: str) -> Any:
    if name not in record:
        raise SourceError(f"{where} has no field {name!r}; it {_has(record)}: set kind= to one of {', '.join(READERS)}")
    return record[name]


def _text(record: Record, name: str, where: str) -> str:
    value = _get(record, name, where)
    if not isinstance(value, str):
        raise SourceError(f"{where}: field {name!r} is {type(value).__name__}, not text; it {_has(record)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SourceError(f"{where}: field {name!r} holds half a surrogate pair; repair the record") from None
    return value


def _optional(record: Record, name: str, where: str) -> str:
    return "" if record.get(name) is None else _text(record, name, where)


def _first(record: Record, name: str, where: str) -> str:
    """A text, or the first of a list of texts."""
    value = _get(record, name, where)
    if isinstance(value, list) and value:
        return _text({name: value[0]}, name, where)
    return _text(record, name, where)
