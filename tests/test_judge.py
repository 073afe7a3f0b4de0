"""The judge: a real local server rates a real model's responses, well or badly; nothing is asked twice or guessed."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from chat_server import Reply, chat_server, in_turn, rated, said

from sparsekd.errors import FormatError, MismatchError, ModelError, RecipeError, SourceError
from sparsekd.journal import Journal
from sparsekd.judge import FAILURES_IN_A_ROW, judge, summary
from sparsekd.rating import Rating, read_ratings, reference_first, score

KEY = "sk-very-secret-0123"
REFERENCE = "Ground truth number"
PROMPTS = 4


@pytest.fixture(autouse=True)
def _no_proxy_no_key_no_waiting(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sparsekd.endpoint._backoff", lambda first_s, failures: 0.0)


@pytest.fixture
def run(world, tmp_path):
    """judge() on four prompts of two responses each; keyword arguments override."""
    prompts = tmp_path / "dolly.jsonl"
    records = [{"instruction": f"The cat counts {i}", "response": f"{REFERENCE} {i}"} for i in range(PROMPTS)]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))

    def call(server, **settings):
        defaults = {
            "model": world.teacher,
            "prompts": prompts,
            "out": tmp_path / "out",
            "judge_model": "judge-1",
            "endpoint": server.url,
            "responses": 2,
            "max_new_tokens": 6,
            "retries": 2,
            "timeout_s": 5.0,
            "device": "cpu",
        }
        return judge(**defaults | settings)

    call.out = tmp_path / "out"
    call.prompts = prompts
    return call


def fair(request):
    """8 for the ground truth, 4 for anything else, wherever they stand."""
    return rated(*(8 if REFERENCE in request.part(name) else 4 for name in ("answer-A", "answer-B")))


def record(folder):
    return [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]


def key_of(request):
    """What identifies a rating's request: its prompt and the two answers, in either order."""
    return request.part("request"), frozenset((request.part("answer-A"), request.part("answer-B")))


# -- a judge that behaves


def test_the_score_is_the_ratio_of_totals(run):
    """A judge that gives 8 to every ground truth and 4 to every response makes 0.5, exactly, in either order."""
    with chat_server(fair) as server:
        result = run(server)
    assert result["score"] == {"mean": 0.5, "standard_error": 0.0}
    assert result["score_by_response"] == [0.5, 0.5]
    assert result["mean_ratings"] == {"reference": 8.0, "response": 4.0, "first": 6.0, "second": 6.0}
    counts = {"prompts": PROMPTS, "prompts_left_out": 0, "responses": 8, "rated": 8, "malformed": 0, "failed": 0}
    assert counts.items() <= result["counts"].items()
    assert result["counts"]["requests"] == len(server.seen) == 8
    assert json.loads((run.out / "judge.json").read_text()) == result


def test_a_request_shows_prompt_and_both_answers_and_nothing_else(run):
    """Model, temperature, limit and one message: no word of which answer is the ground truth, no id, no path."""
    with chat_server(fair) as server:
        run(server)
    for seen in server.seen:
        assert set(seen.body) == {"model", "messages", "temperature", "max_tokens"}
        assert (seen.body["model"], seen.body["temperature"], len(seen.body["messages"])) == ("judge-1", 0, 1)
        assert "dolly" not in json.dumps(seen.body)
        assert REFERENCE in seen.part("answer-A") + seen.part("answer-B")
    assert len({seen.part("request") for seen in server.seen}) == PROMPTS
    prose = server.seen[0].question
    for part in ("request", "answer-A", "answer-B"):
        prose = prose.replace(server.seen[0].part(part), "")
    assert not any(word in prose.lower() for word in ("reference", "ground truth", "student"))


def test_a_liking_for_the_first_answer_cancels(run):
    """A judge who gives 9 to the first and 3 to the second, whatever they are, finds both equally good."""
    with chat_server(in_turn(rated(9, 3))) as server:
        result = run(server)
    assert result["score"]["mean"] == 1.0
    assert result["mean_ratings"] == {"reference": 6.0, "response": 6.0, "first": 9.0, "second": 3.0}


def test_orders_are_balanced_within_and_over_prompts():
    """Of a prompt's five responses two or three see the ground truth first; over prompts the coin is fair."""
    shares = [[reference_first(0, str(prompt), index) for index in range(5)] for prompt in range(2000)]
    assert {sum(share) for share in shares} == {2, 3}
    assert 900 < sum(share[0] for share in shares) < 1100
    assert shares != [[reference_first(1, str(prompt), index) for index in range(5)] for prompt in range(2000)]


def test_the_key_is_in_no_file_and_no_result(run, monkeypatch, capsys):
    """It goes into the header of each request, even when the server repeats it in its replies."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chat_server(in_turn(said(f"I saw {KEY}"), rated(8, 4))) as server:
        result = run(server)
    assert all(seen.headers["Authorization"] == f"Bearer {KEY}" for seen in server.seen)
    files = [path for path in Path(run.out).rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"record.jsonl", "judge.json"}
    assert not any(KEY.encode() in path.read_bytes() for path in files)
    captured = capsys.readouterr()
    assert KEY not in json.dumps(result) + captured.out + captured.err


def test_prompts_that_are_too_long_are_refused_or_left_out_and_counted(run):
    """The model's context of 64 tokens must hold prompt and response; max_prompt_tokens makes that a choice."""
    with run.prompts.open("a") as file:
        file.write(json.dumps({"instruction": "The cat sees the dog. " * 20, "response": f"{REFERENCE} 9"}) + "\n")
    with chat_server(fair) as server:
        with pytest.raises(MismatchError, match=r"1 of 5 prompts do not fit: line 5 .* max_prompt_tokens=58"):
            run(server)
        assert not run.out.exists()
        result = run(server, max_prompt_tokens=58)
    assert (result["counts"]["prompts"], result["counts"]["prompts_left_out"]) == (PROMPTS, 1)


# -- a judge that misbehaves


@pytest.mark.parametrize(
    "failure",
    [
        Reply(status=429, headers={"Retry-After": "0.01"}),
        Reply(status=500),
        None,
        Reply(body=rated(8, 4).body, cut=3),
        Reply(body=b"<html></html>", headers={"Content-Type": "text/html"}),
    ],
    ids=["429", "500", "hangs up", "truncated", "html"],
)
def test_failures_that_pass_do_not_change_the_score(run, failure):
    """Each question's first request fails; every one is asked again, once."""
    met, lock = set(), threading.Lock()

    def behave(request):
        with lock:
            first = key_of(request) not in met
            met.add(key_of(request))
        return failure if first else fair(request)

    with chat_server(behave) as server:
        result = run(server)
    assert result["score"]["mean"] == 0.5
    assert (result["counts"]["rated"], result["counts"]["requests"], len(server.seen)) == (8, 16, 16)


def test_a_malformed_rating_is_asked_again_with_its_reason_then_counted(run):
    """One prompt never gets a readable rating: 1 + retries questions, then malformed, and out of both totals."""

    def behave(request):
        return said("They are both fine, 7/10.") if request.part("request").endswith("0") else fair(request)

    with chat_server(behave) as server:
        result = run(server)
        asked = [seen for seen in server.seen if seen.part("request").endswith("0")]
        assert (result["counts"]["rated"], result["counts"]["malformed"]) == (6, 2)
        assert result["score"]["mean"] == 0.5
        assert len(asked) == 2 * 3
        roles = sorted(tuple(message["role"] for message in seen.body["messages"]) for seen in asked)
        assert roles == [("user",)] * 2 + [("user", "assistant", "user")] * 4
        again = next(seen for seen in asked if len(seen.body["messages"]) == 3).body["messages"]
        assert again[1]["content"] == "They are both fine, 7/10."
        assert "no JSON object with the keys A and B" in again[2]["content"]
        run(server)  # malformed is a verdict: the next run does not ask again
        assert len([seen for seen in server.seen if seen.part("request").endswith("0")]) == 6
    lines = [line for line in record(run.out) if line.get("status") == "malformed"]
    assert all(line["reply"] == "They are both fine, 7/10." and "response" not in line for line in lines)


def test_nothing_readable_is_an_error_and_no_score(run):
    """No judge.json is written, and the reason is told."""
    with (
        chat_server(in_turn(rated(11, 0))) as server,
        pytest.raises(ModelError, match=r"none of 8 ratings came about; of the last, 11 is outside 1 to 10"),
    ):
        run(server, retries=0)
    assert not (run.out / "judge.json").exists()


def test_a_question_that_is_refused_is_counted_and_asked_again_by_the_next_run(run):
    """HTTP 400 for one prompt leaves the others; the next run asks for that one only."""

    def picky(request):
        return Reply(status=400) if request.part("request").endswith("2") else fair(request)

    with chat_server(picky) as server:
        assert run(server)["counts"]["failed"] == 2
    with chat_server(fair) as server:
        result = run(server)
    assert (result["counts"]["failed"], result["counts"]["rated"], len(server.seen)) == (0, 8, 2)


def test_a_judge_that_is_down_stops_the_run(run):
    """After a few questions without an answer, with the way on; not after all of them."""
    with (
        chat_server(in_turn(Reply(status=503))) as server,
        pytest.raises(ModelError, match=r"5 questions in a row without an answer: .*HTTP 503.*run the same command"),
    ):
        run(server, retries=0, responses=8, concurrency=1)
    assert FAILURES_IN_A_ROW <= len(server.seen) < 32


def test_a_judge_that_refuses_the_key_stops_at_once(run):
    """401 will not pass: no other question is sent."""
    with chat_server(in_turn(Reply(status=401))) as server, pytest.raises(ModelError, match="refuses access"):
        run(server, concurrency=1)
    assert len(server.seen) == 1


# -- interruption


def test_a_run_that_broke_off_goes_on_without_asking_twice(run):
    """After three ratings the server refuses; the next run asks for the other five, and the record equals one made
    at once."""
    left = [3]

    def fails_after_three(request):
        left[0] -= 1
        return fair(request) if left[0] >= 0 else Reply(status=401)

    with chat_server(fails_after_three) as server:
        with pytest.raises(ModelError):
            run(server, concurrency=1)
        answered = {key_of(seen) for seen in server.seen[:3]}
    with chat_server(fair) as server:
        result = run(server, concurrency=1)
    assert len(server.seen) == 5
    assert not answered & {key_of(seen) for seen in server.seen}
    with chat_server(fair) as server:
        other = run(server, concurrency=1, out=run.out.with_name("at once"))
    assert record(run.out) == record(run.out.with_name("at once"))
    assert result["score"] == other["score"]


def test_ctrl_c_keeps_what_was_answered(run):
    """KeyboardInterrupt from the main thread: the ratings that came are in the record, the rest is for later."""

    def interrupt(done, total):
        assert total == 16
        if done == 8 + 2:
            raise KeyboardInterrupt

    with chat_server(fair) as server:
        with pytest.raises(KeyboardInterrupt):
            run(server, concurrency=2, progress=interrupt)
        first = len(server.seen)
        kept = sum(line["line"] == "rating" for line in record(run.out))
        assert 2 <= kept == first < 8
        run(server)
        assert len(server.seen) == 8


@pytest.mark.parametrize("damage", [b'{"line":"rating","prompt":"1","in', b"\0\0\0\0\n", b"\xff"])
def test_a_torn_last_line_is_cut_off_and_done_again(run, damage):
    """A crash in the middle of a line costs that line only."""
    with chat_server(fair) as server:
        result = run(server)
        path = run.out / "record.jsonl"
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:-1]) + damage)
        assert run(server)["score"] == result["score"]
        assert len(server.seen) == 9
        assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_damaged_line_within_is_refused_with_its_place(run):
    """Only a last line can be torn; another one is no accident of ours."""
    with chat_server(fair) as server:
        run(server)
        path = run.out / "record.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:3], b"oops\n", *lines[4:]]))
        with pytest.raises(FormatError, match=r"record\.jsonl:4"):
            run(server)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"judge_model": "judge-2"}, "judge_model differs: .* begun with 'judge-1', this run has 'judge-2'"),
        ({"seed": 1}, "seed differs"),
        ({"limit": 3}, "prompts differs"),
        ({"temperature": 0.5}, "temperature differs"),
        ({"judge_settings": {"temperature": 1}}, "judge_settings differs"),
    ],
)
def test_a_record_of_other_settings_is_not_continued(run, setting, words):
    """Half of one judge and half of another would be a score of neither."""
    with chat_server(fair) as server:
        run(server)
        with pytest.raises(MismatchError, match=words):
            run(server, **setting)


def test_settings_may_change_until_there_is_a_response(run, monkeypatch):
    """A first batch that does not fit the memory can be tried again smaller, into the same folder."""

    def too_large(*_, **__):
        raise MemoryError

    with chat_server(fair) as server:
        with monkeypatch.context() as patch:
            patch.setattr("sparsekd.generation.respond", too_large)
            with pytest.raises(MemoryError):
                run(server, batch_size=64)
        assert run(server, batch_size=2)["settings"]["batch_size"] == 2
        run(server, batch_size=2)
        with pytest.raises(MismatchError, match=r"batch_size differs: .* begun with 2, this run has 64"):
            run(server, batch_size=64)
    assert [line["batch_size"] for line in record(run.out) if line["line"] == "settings"] == [64, 2]


def test_two_runs_do_not_share_a_record(run):
    """The second is told to wait."""
    run.out.mkdir()
    with (
        Journal(run.out / "record.jsonl"),
        chat_server(fair) as server,
        pytest.raises(RecipeError, match="another run is writing"),
    ):
        run(server)


@pytest.mark.parametrize(
    "setting",
    [
        {"responses": 0},
        {"temperature": 0.0},
        {"temperature": float("inf")},
        {"max_new_tokens": 0},
        {"concurrency": 0},
        {"prompt_format": "alpaca"},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_asked(run, setting):
    """They are named, and no folder is made."""
    with chat_server(fair) as server, pytest.raises(RecipeError, match=next(iter(setting))):
        run(server, **setting)
    assert (server.seen, run.out.exists()) == ([], False)


def test_prompts_without_ground_truth_are_refused(run, tmp_path):
    """Vicuna's questions come without answers."""
    path = tmp_path / "vicuna.jsonl"
    path.write_text('{"text": "Why?"}\n')
    with chat_server(fair) as server, pytest.raises(SourceError, match=r"vicuna\.jsonl:1 .* add it as the field"):
        run(server, prompts=path)


# -- reading ratings


@pytest.mark.parametrize(
    "reply",
    [
        '{"A": 7, "B": 4}',
        'Both try. A is better.\n{"A": 7, "B": 4}',
        '```json\n{"B": 4, "A": 7.0}\n```\nI hope this helps!',
        '{"A": 7, "B": 4, "reason": "A is right"}',
        '{"ratings": {"A": 7, "B": 4}}',
        'A uses {x} and {"x": 1}. {"A": 7, "B": 4} So: {"A": 7, "B": 4}',
        '<think>{"A": 1, "B": 9}? No.</think>{"A": 7, "B": 4}',
    ],
)
def test_a_rating_is_found_whatever_stands_around_it(reply):
    """Prose, fences, other objects, repetition and thoughts do not hide what is plain."""
    assert read_ratings(reply) == (7.0, 4.0)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("", "empty"),
        ("<think>hm</think>", "empty"),
        ("7 4", "no JSON object"),
        ("A: 7, B: 4", "no JSON object"),
        ("[7, 4]", "no JSON object"),
        ('{"A": 7, "B": }', "no JSON object"),
        ('{"A": 7, "B": NaN}', "no JSON object"),
        ('{"a": 7, "b": 4}', "no JSON object"),
        ('{"A": 7}', "has ratings for A$"),
        ('{"A": 7, "B": 4, "C": 5}', "has ratings for A, B, C"),
        ('{"A": 7, "A": 6, "B": 4}', "has ratings for A, A, B"),
        ('{"A": 7, "B": 11}', "11 is outside 1 to 10"),
        ('{"A": 0, "B": 4}', "0 is outside 1 to 10"),
        ('{"A": -7, "B": 4}', "-7 is outside"),
        ('{"A": 7, "B": 1e400}', "is not a number"),
        ('{"A": "7/10", "B": 4}', '"7/10" is not a number'),
        ('{"A": true, "B": 4}', "true is not a number"),
        ('{"A": null, "B": 4}', "null is not a number"),
        ('{"A": 7, "B": 4} or rather {"A": 4, "B": 7}', "contradict each other"),
        ('{"A": 7, "B": 4} but {"A": 12, "B": 4}', "12 is outside"),
    ],
)
def test_a_rating_is_never_guessed(reply, words):
    """What is missing, doubled, out of range or contradictory has a reason and no value."""
    with pytest.raises(ValueError, match=words):
        read_ratings(reply)


def test_an_answer_cannot_close_its_own_tags(run):
    """The tags carry digits made from what they enclose, so a response would have to contain its own hash."""
    with chat_server(fair) as server:
        run(server)
    tags = {seen.question.partition("<answer-A-")[2].partition(">")[0] for seen in server.seen}
    assert len(tags) == 8


# -- numbers by hand


def ratings(*rows):
    names = ("prompt", "index", "reference", "response", "reference_first")
    return [Rating(**dict(zip(names, row, strict=True))) for row in rows]


def test_the_score_by_hand():
    """(4 + 5 + 6) / (8 + 10 + 6) over two prompts of two responses, one malformed; its error as written down."""
    some = ratings(("1", 0, 8, 4, True), ("1", 1, 10, 5, False), ("2", 0, 6, 6, True))
    result = score(some)
    ratio = 15 / 24
    residual = (9 - ratio * 18) ** 2 + (6 - ratio * 6) ** 2
    assert result["score"]["mean"] == pytest.approx(ratio)
    assert result["score"]["standard_error"] == pytest.approx((2 / 1 * residual) ** 0.5 / 24)
    assert result["score_by_response"] == [pytest.approx(10 / 14), 0.5]
    assert result["average_score"]["mean"] == pytest.approx((10 / 14 + 0.5) / 2)
    assert result["mean_ratings"] == {"reference": 8.0, "response": 5.0, "first": 19 / 3, "second": 20 / 3}


def test_one_prompt_has_a_score_and_no_error():
    """JSON has no nan: the error is null."""
    assert score(ratings(("1", 0, 8, 4, True)))["score"] == {"mean": 0.5, "standard_error": None}


def test_the_last_line_of_an_item_counts():
    """A failed question that a later run got answered is rated, and its requests are all counted."""
    item = {"line": "rating", "prompt": "1", "index": 0, "reference_first": True}
    response = {"line": "response", "prompt": "1", "index": 0, "text": "", "finished": False}
    rated_line = item | {"status": "rated", "reference": 5.0, "response": 5.0, "requests": 2}
    counts = summary([response, item | {"status": "failed", "problem": "x"}, rated_line])["counts"]
    assert (counts["rated"], counts["failed"], counts["requests"]) == (1, 0, 2)
    assert (counts["empty_responses"], counts["cut_off_responses"]) == (1, 1)


def test_the_verb_takes_the_same_settings_and_prints_the_score(run, world, monkeypatch, capsys):
    """`sparsekd judge key=value ...` ends with the score in percent and the counts."""
    from sparsekd import cli

    with chat_server(fair) as server:
        words = [f"model={world.teacher}", f"prompts={run.prompts}", f"out={run.out}", f"endpoint={server.url}"]
        words += [
            "judge_model=judge-1",
            "responses=1",
            "max_new_tokens=4",
            "api_key_env=null",
            "judge_settings.top_p=1",
        ]
        monkeypatch.setattr("sys.argv", ["sparsekd", "judge", *words])
        cli.main()
    assert capsys.readouterr().out.startswith("score 50.0% ± 0.0%\n4 prompts, 4 rated, 0 malformed, 0 failed")
    assert server.seen[0].body["top_p"] == 1
