"""Recipes: a stage's settings are its program's keyword arguments, strictly, from YAML and key=value words."""

from __future__ import annotations

import inspect
import re

import pytest
import yaml
from pydantic import ValidationError

from sparsekd import recipes
from sparsekd.errors import RecipeError
from sparsekd.recipes import STAGES, check, read_recipe, recipe_of, scalar, settings_text, stage

REQUIRED = {
    "pack": {"source": "a.jsonl", "tokenizer": "train", "seq_len": 32, "out": "rows"},
    "repack": {"rows": "rows", "tokenizer": "t", "out": "other"},
    "plan": {"rows": "rows", "teacher": "t", "out": "plan"},
    "capture": {"rows": "rows", "teacher": "t", "out": "cache"},
    "adapt": {"out": "a", "teacher": "t", "rows": "rows"},
    "merge": {"caches": ["a", "b"], "out": "m"},
    "transcode": {"cache": "cache", "tokenizer": "t"},
    "pool": {"caches": ["a", "b"], "out": "p"},
    "misalign": {"cache": "cache", "rows": "rows", "out": "m"},
    "train": {"out": "s", "student": "tiny"},
    "evaluate": {"model": "m", "rows": "rows"},
    "tasks": {"model": "m"},
    "speculate": {"teacher": "t", "student": "s", "rows": "rows"},
    "answer": {"model": "m", "prompts": "p.jsonl", "out": "o"},
    "judge": {"model": "m", "prompts": "p.jsonl", "out": "o", "judge_model": "j"},
    "reproduce": {},
    "demo": {},
}


def words(verb, **more):
    return [f"{key}={value}" for key, value in (REQUIRED[verb] | more).items()]


@pytest.fixture
def write(tmp_path):
    def write_(text):
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "r.yaml")

    return write_


@pytest.mark.parametrize("verb", STAGES)
def test_settings_are_the_programs_keyword_arguments(verb):
    """Every keyword argument but what only code can pass is a setting, with the same default; nothing else is."""
    values = read_recipe(verb, None, words(verb))
    parameters = inspect.signature(stage(verb)).parameters
    assert set(values) == set(parameters) - {"progress", "callbacks"}
    for name in set(values) - set(REQUIRED[verb]):
        assert values[name] == parameters[name].default


@pytest.mark.parametrize("verb", STAGES)
def test_what_is_required_is_asked_for_by_name(verb):
    """Leaving out a required setting names it and says where all are listed."""
    for name in REQUIRED[verb]:
        left = [word for word in words(verb) if not word.startswith(f"{name}=")]
        with pytest.raises(RecipeError, match=rf"{verb} needs {name}=\.\.\.; sparsekd {verb} --settings lists all"):
            read_recipe(verb, None, left)


@pytest.mark.parametrize("verb", STAGES)
def test_every_setting_is_listed_with_its_meaning(verb):
    """--settings shows each setting once, what is required, and its docstring's words under it."""
    text = settings_text(verb)
    for name in recipe_of(stage(verb)).model_fields:
        assert len(re.findall(rf"^  {name} \(.*\n {{6}}\S", text, re.M)) == 1
    for name in REQUIRED[verb]:
        assert "required" in next(line for line in text.splitlines() if line.startswith(f"  {name} ("))
    assert max(map(len, text.splitlines())) <= 100


def test_meanings_come_from_the_docstring():
    """The Args entry of a setting, joined over its lines, is printed under it."""
    lines = settings_text("pack").splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("  heldout "))
    assert lines[at : at + 2] == [
        "  heldout (float, default 0.02)",
        '      share of the documents, in [0, 1), that goes to the split "heldout".',
    ]


def test_an_unknown_key_is_refused_with_the_nearest_one():
    """A typo is named before a missing setting is: it explains it."""
    with pytest.raises(RecipeError, match="pack has no setting 'seq_length'; did you mean 'seq_len'"):
        read_recipe("pack", None, ["seq_length=32"])
    for name, ours in (("lr", "learning_rate"), ("bf16", "dtype=bfloat16"), ("num_train_epochs", "epochs")):
        with pytest.raises(RecipeError, match=f"train has no setting '{name}'; did you mean '{ours}'"):
            check("train", {name: 1})
    with pytest.raises(RecipeError, match=r"capture has no setting 'rounds'; did you mean 'sampler.rounds'"):
        check("capture", {"rounds": 50})
    with pytest.raises(RecipeError, match="evaluate has no setting 'zzz'; it has model, rows, split"):
        read_recipe("evaluate", None, words("evaluate", zzz=1))


@pytest.mark.parametrize(
    ("verb", "word", "message"),
    [
        ("pack", "seq_len=abc", "pack: seq_len=abc is not a whole number"),
        ("pack", "seq_len=12.5", "pack: seq_len=12.5 is not a whole number"),
        ("pack", "seq_len=true", "pack: seq_len=true is not a whole number"),
        ("pack", "seq_len.x=3", "pack: seq_len={'x': 3} is not a whole number"),
        ("pack", "heldout=much", "pack: heldout=much is not a number"),
        ("capture", "force=maybe", "capture: force=maybe is not true or false"),
        ("capture", "limit_rows=some", "capture: limit_rows=some is not a whole number"),
        ("train", "adam_betas=[0.9]", "train: adam_betas=[0.9] is not a list of 2"),
    ],
)
def test_a_wrong_type_is_refused_in_words(verb, word, message):
    """The setting, the value as it was written, and what would have been right."""
    with pytest.raises(RecipeError) as error:
        read_recipe(verb, None, [*words(verb), word])
    assert str(error.value) == message


@pytest.mark.parametrize("word", ["nonsense", "=3", ".=3", "a.=3", ".a=3", "sampler..k=3", ""])
def test_a_word_that_is_no_setting_is_refused(word):
    """Without a key, a part of a key or an equals sign there is nothing to set."""
    with pytest.raises(RecipeError, match="is not key=value, such as seed=1"):
        read_recipe("pack", None, [word])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1", -1),
        ("1e-3", 0.001),
        ("0.5", 0.5),
        ("true", True),
        ("False", False),
        ("null", None),
        ("none", None),
        ("0:4", "0:4"),
        ("12:30", "12:30"),
        ("a=b", "a=b"),
        ("", ""),
        ("[0.9, 95e-2]", [0.9, 0.95]),
        ("[a, b*.txt]", ["a", "b*.txt"]),
        ("{k: 12}", {"k": 12}),
    ],
)
def test_scalars(text, value):
    """Numbers, truth, null, lists and mappings are read; all other text stays as it is."""
    found = scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_a_broken_list_is_refused():
    """An opening bracket asks for a list."""
    with pytest.raises(RecipeError, match=r"'\[1' is not a list such as"):
        scalar("[1")


def test_settings_that_take_text_keep_it():
    """out=0010 keeps its zeros, 1e3 is a name; a number's setting still takes 1e6."""
    values = read_recipe("pack", None, words("pack", out="0010", source="1e3", limit_tokens="1e6"))
    assert str(values["out"]) == "0010"
    assert values["source"] == "1e3"
    assert values["limit_tokens"] == 10**6
    assert read_recipe("capture", None, words("capture", shard_range="0:4"))["shard_range"] == "0:4"
    assert read_recipe("pack", None, words("pack", source="[a, b]"))["source"] == ["a", "b"]
    assert read_recipe("train", None, words("train", dtype="null"))["dtype"] is None


@pytest.mark.parametrize(
    ("given", "sampler"),
    [
        (["sampler=top_k"], "top_k"),
        (["sampler.rounds=9"], {"rounds": 9}),
        (["sampler=top_k", "sampler.k=12"], {"name": "top_k", "k": 12}),
        (["sampler.k=12", "sampler=top_k"], {"name": "top_k", "k": 12}),
        (["sampler={name: top_k, k: 3}", "sampler.k=12"], {"name": "top_k", "k": 12}),
        (["sampler.temperature=1e-1"], {"temperature": 0.1}),
    ],
)
def test_nested_settings_join_a_name(given, sampler):
    """sampler=top_k and sampler.k=12 make one mapping, in either order."""
    assert read_recipe("capture", None, [*words("capture"), *given])["sampler"] == sampler


def test_a_student_by_name_takes_sizes():
    """student=tiny student.hidden_size=96 names the family, in either order."""
    expected = {"family": "mini", "hidden_size": 96}
    assert read_recipe("train", None, ["out=s", "student=mini", "student.hidden_size=96"])["student"] == expected
    assert read_recipe("train", None, ["out=s", "student.hidden_size=96", "student=mini"])["student"] == expected


def test_words_override_the_file(write):
    """The same keys in YAML; a word replaces one of them and leaves its neighbours."""
    file = write("rows: r\nteacher: t\nout: c\nseed: 3\nsampler: {name: top_k, k: 5}\n")
    values = read_recipe("capture", file, ["sampler.k=12", "seed=4", "out=d"])
    assert (values["sampler"], values["seed"], str(values["out"])) == ({"name": "top_k", "k": 12}, 4, "d")
    assert read_recipe("capture", file, [])["sampler"] == {"name": "top_k", "k": 5}
    flat = write("rows: r\nteacher: t\nout: c\nsampler: top_k\n")
    assert read_recipe("capture", flat, ["sampler.k=12"])["sampler"] == {"name": "top_k", "k": 12}


@pytest.mark.parametrize("verb", STAGES)
def test_settings_survive_yaml(verb, write):
    """Complete settings, written as YAML and read again, are the same."""
    values = read_recipe(verb, None, words(verb))
    plain = {key: str(value) if key == "out" and value is not None else value for key, value in values.items()}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}
    again = read_recipe(verb, write(yaml.safe_dump(plain)), [])
    assert {k: str(v) for k, v in again.items()} == {k: str(v) for k, v in values.items()}


def test_yaml_reads_numbers_and_ranges_as_they_look(write):
    """1e-3 is a number and 10:40 is text, which YAML 1.1 has the other way round."""
    file = write("rows: r\nteacher: t\nout: c\nshard_range: 10:40\nsampler:\n  temperature: 1e-3\n  rounds: 10\n")
    values = read_recipe("capture", file, [])
    assert values["shard_range"] == "10:40"
    assert values["sampler"] == {"temperature": 0.001, "rounds": 10}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds a list; write key: value lines"),
        ("just text", "holds a str; write key: value lines"),
        ("a: [1\nb", "is not YAML: .*line 2"),
        ("seq_len: 32\nseq_len: 64\n", "'seq_len' is there twice, line 2"),
        ("1: 2\n", "has the key 1; keys are names"),
        ("a: !!python/object:os.system {}\n", "is not YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(write, text, message):
    """Lists, broken YAML, keys that stand twice and objects are told with their place."""
    with pytest.raises(RecipeError, match=message):
        read_recipe("pack", write(text), [])


def test_an_empty_file_sets_nothing(write):
    """Comments alone leave all to the words."""
    assert read_recipe("train", write("# nothing\n"), words("train")) == read_recipe("train", None, words("train"))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    """A missing file, a folder and bytes that are no text are told by name."""
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*nope\.yaml: No such file"):
        read_recipe("pack", str(tmp_path / "nope.yaml"), [])
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        read_recipe("pack", str(tmp_path), [])
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"the recipe .*b\.yaml is not text in UTF-8"):
        read_recipe("pack", str(tmp_path / "b.yaml"), [])


def test_a_recipe_is_frozen():
    """A validated recipe cannot be changed afterwards."""
    recipe = recipe_of(stage("train"))(**REQUIRED["train"])
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3


def test_check_does_not_change_what_it_is_given():
    """Defaults are filled into a copy."""
    given = dict(REQUIRED["train"])
    assert check("train", given)["seed"] == 0
    assert given == REQUIRED["train"]


def test_stages_name_functions_that_exist():
    """Each verb's program imports and takes keywords only."""
    for verb in recipes.STAGES:
        kinds = {parameter.kind for parameter in inspect.signature(stage(verb)).parameters.values()}
        assert kinds == {inspect.Parameter.KEYWORD_ONLY}


def test_names_that_may_be_chosen_are_listed():
    """Who asks for the settings sees each sampler and each size of student by its name."""
    from sparsekd.drawing import SKETCHES
    from sparsekd.models import FAMILY
    from sparsekd.samplers import SAMPLERS

    for verb, names in (("capture", SAMPLERS | SKETCHES), ("train", FAMILY)):
        assert set(names) <= set(re.findall(r"[\w]+", settings_text(verb)))
