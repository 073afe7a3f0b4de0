"""Zero-shot tasks: lm-eval's numbers against log-likelihoods summed by hand, without a network, and the refusals."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsekd import models, vocab
from sparsekd.cli import app
from sparsekd.errors import ModelError, RecipeError, SourceError
from sparsekd.tasks import PAPER_TASKS, run_tasks

NAMES = ("cat", "dog", "fox", "owl", "hen")
RIDDLES = [
    {
        "question": f"The {NAMES[i % 5]} likes the {NAMES[i % 3]} and counts {i % 8}",
        "choices": [f" {i % 8 + 1} {i % 8 + 2}.", f" {(i + 3) % 8} {i % 5}. The cat", f" {NAMES[i % 4]}"],
        "answer": i % 3 if i % 2 else 0,
    }
    for i in range(12)
]
TEXTS = [f"The {NAMES[i % 5]} fears the {NAMES[i % 4]} and counts {i} {i + 1}." for i in range(6)]
HEAD = "task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
RIDDLES_YAML = """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
CLOZE_YAML = """output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
"""
TEXTS_YAML = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install 'sparsekd[eval]'",
)
# What libraries below lm-eval do with files and regular expressions is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three tasks of our own, questions and all; what `datasets` keeps of them goes with the test."""
    import datasets

    home = tmp_path_factory.mktemp("tasks")
    kept, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, home / "kept"
    for name, lines, body in (
        ("riddles", RIDDLES, RIDDLES_YAML),
        ("cloze", RIDDLES, CLOZE_YAML),
        ("texts", [{"text": text} for text in TEXTS], TEXTS_YAML),
    ):
        data = home / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (home / f"{name}.yaml").write_text(HEAD.format(name=name, data=data) + body)
    yield home
    datasets.config.HF_DATASETS_CACHE = kept


@pytest.fixture(scope="module")
def found(world, folder, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("found")
    result = run_tasks(
        model=world.teacher, tasks="riddles, cloze,texts", include_path=str(folder), out=out, device="cpu"
    )
    assert json.loads((out / "tasks.json").read_text()) == result
    return result


class ByHand:
    """Log-likelihoods of text under a model, one sequence at a time in float64 sums."""

    def __init__(self, path: str) -> None:
        self.model, self.tokenizer = models.open_model(path, device="cpu"), vocab.load_tokenizer(path)

    @torch.no_grad()
    def __call__(self, context: str, continuation: str) -> float:
        """log p(continuation | context); an empty context is the end-of-text token alone."""
        whole = self.tokenizer(context + continuation)["input_ids"]
        first = len(self.tokenizer(context)["input_ids"])
        if not context:
            whole, first = [self.tokenizer.eos_token_id, *whole], 1
        log_p = self.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return math.fsum(float(log_p[i - 1, whole[i]]) for i in range(first, len(whole)))


@pytest.fixture(scope="module")
def by_hand(world) -> ByHand:
    return ByHand(world.teacher)


def mean_and_error(values: list[float]) -> dict[str, float]:
    return {"mean": np.mean(values), "standard_error": np.std(values, ddof=1) / math.sqrt(len(values))}


@needs_lm_eval
@pytest.mark.parametrize(("metric", "length"), [("acc", lambda _: 1), ("acc_norm", len)])
def test_multiple_choice_takes_the_likeliest_answer(found, by_hand, metric, length):
    """acc compares log-likelihoods, acc_norm those per character; both with the error of a mean of 0s and 1s."""
    hits = []
    for riddle in RIDDLES:
        scores = [by_hand(riddle["question"], choice) / length(choice) for choice in riddle["choices"]]
        hits.append(float(np.argmax(scores) == riddle["answer"]))
    assert 0 < sum(hits) < len(hits)  # else every way to score would pass
    assert found["tasks"]["riddles"][metric] == pytest.approx(mean_and_error(hits))


@needs_lm_eval
def test_a_cloze_has_the_perplexity_of_its_answers(found, by_hand):
    """perplexity is exp(-mean log-likelihood) of whole answers (as LAMBADA's), with a resampled error."""
    values = [by_hand(riddle["question"], riddle["choices"][0]) for riddle in RIDDLES]
    cloze = found["tasks"]["cloze"]
    assert cloze["perplexity"]["mean"] == pytest.approx(math.exp(-np.mean(values)), rel=1e-4)
    by_formula = cloze["perplexity"]["mean"] * mean_and_error(values)["standard_error"]
    assert cloze["perplexity"]["standard_error"] == pytest.approx(by_formula, rel=0.5)


@needs_lm_eval
def test_rolling_text_has_the_perplexity_of_all_its_tokens(found, by_hand):
    """Bits per byte are Σ -log p / ln 2 / bytes, the first token after end-of-text; no error is made up."""
    nats = -math.fsum(by_hand("", text) for text in TEXTS)
    texts = found["tasks"]["texts"]
    size = sum(len(text.encode()) for text in TEXTS)
    assert texts["bits_per_byte"] == {
        "mean": pytest.approx(nats / math.log(2) / size, rel=1e-5),
        "standard_error": None,
    }
    assert texts["byte_perplexity"]["mean"] == pytest.approx(math.exp(nats / size), rel=1e-5)


@needs_lm_eval
def test_the_average_is_over_scores_only(found):
    """acc_norm goes before acc, a perplexity is no score, and the error is that of a mean of independent scores."""
    riddles, cloze = found["tasks"]["riddles"]["acc_norm"], found["tasks"]["cloze"]["acc"]
    assert found["average"]["of"] == {"riddles": "acc_norm", "cloze": "acc"}
    assert found["average"]["mean"] == pytest.approx((riddles["mean"] + cloze["mean"]) / 2)
    assert found["average"]["standard_error"] == pytest.approx(
        math.hypot(riddles["standard_error"], cloze["standard_error"]) / 2
    )
    assert found["questions"] == {"riddles": 12, "cloze": 12, "texts": 6}


@needs_lm_eval
def test_limit_takes_the_first_questions_and_no_score_means_no_average(world, folder, tmp_path):
    """limit=2 asks two; a perplexity alone has no average."""
    found = run_tasks(
        model=world.teacher, tasks=["texts"], include_path=str(folder), limit=2, out=tmp_path, device="cpu"
    )
    assert found["questions"] == {"texts": 2}
    assert found["average"] is None


@needs_lm_eval
def test_a_missing_data_file_is_named_with_the_way_out(world, folder, tmp_path):
    """The task's name, the file, and that paths are absolute."""
    shutil.copy(folder / "texts.yaml", tmp_path / "lost.yaml")
    text = (tmp_path / "lost.yaml").read_text().replace("task: texts", "task: lost").replace(str(folder), "elsewhere")
    (tmp_path / "lost.yaml").write_text(text)
    with pytest.raises(SourceError, match=r"data of task 'lost'.*elsewhere.*give data_files as absolute paths"):
        run_tasks(model=world.teacher, tasks="lost", include_path=str(tmp_path), device="cpu")


@pytest.fixture
def no_network(monkeypatch) -> None:
    import datasets

    def unreachable(path: str, *_: object, **__: object) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)


@needs_lm_eval
def test_a_hub_task_without_a_network_says_so(no_network, folder):
    """A ConnectionError of the data's library becomes a sentence with both ways out."""
    words = r"data of task 'texts': Couldn't reach .* HF_HUB_OFFLINE .* include_path=FOLDER"
    with pytest.raises(SourceError, match=words):
        run_tasks(model="./nowhere", tasks="texts", include_path=str(folder))


@pytest.fixture
def small_index(monkeypatch) -> None:
    """lm-eval's index of the paper's tasks only: reading all 14,000 takes ten seconds."""
    import lm_eval.tasks as home

    folders = [Path(home.__file__).parent / name for name in ("arc", "hellaswag", "lambada", "piqa")]

    class Small(home.TaskManager):
        def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
            own = [include_path] if include_path else []
            super().__init__(include_path=[*(folders if include_defaults else []), *own], include_defaults=False)

    monkeypatch.setattr(home, "TaskManager", Small)


@needs_lm_eval
def test_an_unknown_task_names_near_ones(small_index, folder):
    """Of lm-eval's index and of the folder; before any data is loaded or any model opened."""
    with pytest.raises(RecipeError, match=r"there is no task 'hellaswg' in lm-eval .* or in .*did you mean hellaswag"):
        run_tasks(model="./nowhere", tasks="riddles,hellaswg", include_path=str(folder))
    with pytest.raises(RecipeError, match=r"there is no task 'ridles' .*did you mean riddles"):
        run_tasks(model="./nowhere", tasks="ridles", include_path=str(folder))


@needs_lm_eval
def test_lm_eval_knows_the_papers_tasks(small_index, no_network):
    """The default tasks exist under these names: what fails is the network, not the name."""
    with pytest.raises(SourceError, match="cannot load the data of task 'arc_easy'"):
        run_tasks(model="./nowhere")
    with pytest.raises(RecipeError, match="no task 'arc_eazy'"):
        run_tasks(model="./nowhere", tasks=PAPER_TASKS + ",arc_eazy")


@needs_lm_eval
def test_a_model_without_a_tokenizer_is_refused(world, folder, tmp_path):
    """Tasks are text: a folder of weights alone cannot take them."""
    models.open_model(world.teacher, device="cpu").save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="comes without a tokenizer"):
        run_tasks(model=str(tmp_path / "bare"), tasks="riddles", include_path=str(folder), device="cpu")


def test_without_lm_eval_the_package_to_install_is_named(monkeypatch):
    """The extra that brings it, before any model is opened."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r"tasks need the package lm-eval .*pip install 'sparsekd\[eval\]'"):
        run_tasks(model="./nowhere")


@needs_lm_eval
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limit": 0}, "limit=0 is too small"),
        ({"num_fewshot": -1}, "num_fewshot=-1 is too small; give at least 0"),
        ({"tasks": " , "}, f"names no task; give some, such as tasks={PAPER_TASKS}"),
        ({"include_path": "./nowhere"}, "include_path=./nowhere is no folder"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    """Each with the value, before any model is opened."""
    with pytest.raises(RecipeError, match=words):
        run_tasks(model="./nowhere", **settings)


@needs_lm_eval
@pytest.mark.parametrize("words", [["tasks", "tasks=riddles"], ["evaluate", "--tasks", "riddles"]])
def test_two_verbs_reach_the_tasks(world, folder, tmp_path, capsys, words):
    """`sparsekd tasks tasks=A` and `sparsekd evaluate --tasks A` print the same table and write the same file."""
    app(
        [*words, f"model={world.teacher}", f"include_path={folder}", f"out={tmp_path}", "device=cpu"],
        standalone_mode=False,
    )
    score = json.loads((tmp_path / "tasks.json").read_text())["tasks"]["riddles"]["acc"]
    printed = capsys.readouterr().out
    assert f"riddles  acc              {score['mean']:.4f} ± {score['standard_error']:.4f}" in printed
    assert "average" in printed
