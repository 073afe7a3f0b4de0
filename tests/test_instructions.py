"""Five shapes of test sets become prompts with references; what is of no shape is refused with its place."""

from __future__ import annotations

import json

import pytest

from sparsekd.errors import RecipeError, SourceError
from sparsekd.instructions import Prompt, digest, item_number, load_prompts, words

LONG = "one two three four five six seven eight nine ten eleven twelve"
SHORT = LONG.removesuffix(" twelve")


def write(tmp_path, *records, name="set.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def pairs(prompts):
    return [(each.prompt, each.reference) for each in prompts]


@pytest.mark.parametrize(
    ("kind", "record", "expected"),
    [
        (
            "dolly",
            {"instruction": "Sum it up.", "context": "A text.", "response": "So."},
            ("Sum it up.\n\nA text.", "So."),
        ),
        ("dolly", {"instruction": "Say hi.", "context": "", "response": "hi"}, ("Say hi.", "hi")),
        ("dolly", {"instruction": "Say hi.", "response": "hi", "category": "open"}, ("Say hi.", "hi")),
        ("selfinst", {"instruction": "Do.", "instances": [{"input": "x", "output": "y"}]}, ("Do.\n\nx", "y")),
        ("vicuna", {"question_id": 1, "text": "Why?"}, ("Why?", None)),
        ("vicuna", {"turns": ["Why?"], "reference": ["Because."]}, ("Why?", "Because.")),
        ("vicuna", {"text": "Why?", "reference": "Because."}, ("Why?", "Because.")),
        ("sni", {"definition": ["Do."], "inputs": "x", "targets": [LONG, "other"]}, ("Do.\n\nx", LONG)),
        ("sni", {"definition": "Do.", "inputs": "x", "targets": LONG}, ("Do.\n\nx", LONG)),
        (
            "unni",
            {"instruction": "Do.", "instances": [{"input": "x", "output": LONG, "constraints": "In verse."}]},
            ("Do.\n\nx\n\nIn verse.", LONG),
        ),
        (
            "unni",
            {"instruction": "Do.", "instances": [{"input": "x", "output": LONG, "constraints": "None."}]},
            ("Do.\n\nx", LONG),
        ),
    ],
)
def test_each_shape_is_recognised_and_read(tmp_path, kind, record, expected):
    """kind="auto" reads what the kind's own name reads; instruction and input are a blank line apart."""
    path = write(tmp_path, record)
    assert pairs(load_prompts(path)) == [expected]
    assert load_prompts(path, kind=kind) == load_prompts(path)


def test_ids_are_lines_and_instances(tmp_path):
    """An id finds its record: blank lines count, and several instances on a line are told apart."""
    first = {"instruction": "a", "instances": [{"input": "1", "output": "x"}]}
    second = {"instruction": "b", "instances": [{"input": "1", "output": "x"}, {"input": "2", "output": "y"}]}
    path = tmp_path / "set.jsonl"
    path.write_text(f"\ufeff{json.dumps(first)}\n\n{json.dumps(second)}", encoding="utf-8")
    assert [each.id for each in load_prompts(path)] == ["1", "3.0", "3.1"]


def test_as_many_targets_as_inputs_are_pairs(tmp_path):
    """S-NI records may hold several inputs; each target may be a list whose first counts."""
    record = {"definition": "Do.", "inputs": ["x", "y"], "targets": [LONG, [f"{LONG} z", "q"]]}
    assert pairs(load_prompts(write(tmp_path, record))) == [("Do.\n\nx", LONG), ("Do.\n\ny", f"{LONG} z")]


@pytest.mark.parametrize(
    ("kind", "left"), [("sni", [LONG]), ("unni", [LONG]), ("selfinst", [SHORT, LONG])], ids=["sni", "unni", "selfinst"]
)
def test_the_papers_filter_keeps_more_than_eleven_words(tmp_path, kind, left):
    """Eleven words go, twelve stay, for S-NI and UnNI only; min_response_words overrides it."""
    assert words(SHORT) == 11
    if kind == "sni":
        records = [{"definition": "Do.", "inputs": "x", "targets": [text]} for text in (SHORT, LONG)]
    else:
        records = [{"instruction": "Do.", "input": "x", "output": text} for text in (SHORT, LONG)]
    path = write(tmp_path, *records)
    assert [each.reference for each in load_prompts(path, kind=kind)] == left
    assert [each.reference for each in load_prompts(path, kind=kind, min_response_words=11)] == [SHORT, LONG]
    assert [each.reference for each in load_prompts(path, kind=kind, min_response_words=12)] == [LONG]


def test_flat_records_of_two_sets_are_not_guessed(tmp_path):
    """SelfInst and UnNI differ in the filter only, so with the filter given there is nothing to guess."""
    path = write(tmp_path, {"instruction": "Do.", "input": "x", "output": "y"})
    with pytest.raises(SourceError, match=r"set\.jsonl:1 can be SelfInst or UnNI.*kind=selfinst or kind=unni"):
        load_prompts(path)
    assert pairs(load_prompts(path, min_response_words=0)) == [("Do.\n\nx", "y")]


def test_a_limit_draws_a_sample_that_the_seed_decides(tmp_path):
    """In the file's order, without replacement, another one for another seed; a larger limit takes all."""
    path = write(tmp_path, *[{"instruction": f"q{i}", "response": "r"} for i in range(50)])
    drawn = [[int(each.id) for each in load_prompts(path, limit=10, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(ids == sorted(set(ids)) and len(ids) == 10 for ids in drawn)
    assert drawn[0] != list(range(1, 11))
    assert len(load_prompts(path, limit=51)) == 50


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"set\.jsonl holds no record"),
        ('{"instruction": "a", "response": "b"}\n{oops', r"set\.jsonl:2 is not JSON"),
        ("[1]", r"set\.jsonl:1 is a JSON list, not a record"),
        ("[" * 100_000, r"set\.jsonl:1 is not JSON"),
        ('{"foo": 1, "bar": 2}', r"set\.jsonl:1 has the fields 'foo', 'bar', which is no known shape"),
        (
            '{"instruction": "a", "response": "b"}\n{"instruction": "a", "answer": "b"}',
            r"set\.jsonl:2 has no field 'response'; it has the fields 'instruction', 'answer'",
        ),
        ('{"instruction": ["a"], "response": "b"}', r"set\.jsonl:1: field 'instruction' is list, not text"),
        ('{"instruction": "a", "response": " "}', r"set\.jsonl:1 has an empty reference"),
        ('{"instruction": "", "response": "b"}', r"set\.jsonl:1 has an empty prompt"),
        ('{"instruction": "a", "response": "\\ud800"}', r"set\.jsonl:1: field 'response' holds half a surrogate"),
        ('{"turns": ["a", "b"]}', r"set\.jsonl:1 has 2 turns"),
        ('{"definition": "a", "inputs": ["b", "c"], "targets": ["d"]}', r"has 2 inputs and 1 targets"),
        ('{"definition": "a", "inputs": "b", "targets": "short"}', r"none of 1 references has 12 words"),
        ('{"instruction": "a", "instances": []}', r"field 'instances' is no list of records"),
        ('{"instruction": "a", "instances": [{"input": "b"}]}', r":1: instance 0 has no field 'output'"),
    ],
)
def test_what_is_no_test_set_is_refused_with_its_place(tmp_path, text, words):
    """The message has file:line, and the fields that were found."""
    path = tmp_path / "set.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=words):
        load_prompts(path)


def test_bytes_that_are_no_text_are_refused_with_their_place(tmp_path):
    """UTF-16 files are common on Windows."""
    path = tmp_path / "set.jsonl"
    path.write_bytes('{"instruction": "a", "response": "b"}'.encode("utf-16"))
    with pytest.raises(SourceError, match=r"set\.jsonl:1 is not JSON"):
        load_prompts(path)


def test_a_missing_file_is_told_with_its_neighbours(tmp_path):
    """Most missing files are misspelt."""
    write(tmp_path, {"text": "a"}, name="vicuna.jsonl")
    with pytest.raises(SourceError, match=r"does not exist; the nearest folder .* holds vicuna\.jsonl"):
        load_prompts(tmp_path / "vicunna.jsonl")


def test_a_filter_by_length_needs_references(tmp_path):
    """A prompt without one is neither long nor short."""
    with pytest.raises(SourceError, match=r"set\.jsonl:1 has no reference to measure"):
        load_prompts(write(tmp_path, {"text": "a"}), min_response_words=3)


@pytest.mark.parametrize("setting", [{"kind": "alpaca"}, {"limit": 0}, {"min_response_words": -1}, {"seed": -1}])
def test_settings_out_of_range_are_refused(tmp_path, setting):
    """They are named before the file is read."""
    with pytest.raises(RecipeError, match=next(iter(setting))):
        load_prompts(tmp_path / "nowhere.jsonl", **setting)


def test_a_digest_changes_with_prompt_reference_and_order():
    """And with nothing else."""
    a, b = (Prompt(id=name, prompt="p", reference="r") for name in "ab")
    others = [
        [b, a],
        [a],
        [Prompt(id="a", prompt="p", reference=None), b],
        [Prompt(id="a", prompt="q", reference="r"), b],
    ]
    assert len({digest(each) for each in ([a, b], *others)}) == 5
    assert digest([a, b]) == digest([a, b])


def test_item_numbers_are_fixed_for_ever():
    """The first 63 bits of sha256("17/3"), written out: draws must not move between versions."""
    assert item_number("17", 3) == 0xEBD7BBD2748E07A0 >> 1
