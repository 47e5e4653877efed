"""A served model, against a real HTTP server on the loopback address that speaks the protocol."""

import json

import pytest
from rich.console import Console

from plumbline.errors import InputError
from plumbline.rewards.workers import Grader
from plumbline.rl.batch import Prompt, Sampling
from plumbline.rl.evaluation.endpoint import Endpoint, EndpointError, Messages
from plumbline.rl.evaluation.launch import launch_evaluation
from plumbline.rl.evaluation.manifest import read_manifest
from plumbline.rl.evaluation.request import Request
from plumbline.rl.files import read_rows


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


def endpoint(server, grader, **changes):
    messages = Messages("Be brief.", "Box it.")
    return Endpoint(server.url, "tiny", messages, grader, **({"pause_seconds": 0.01, "concurrency": 4} | changes))


PROMPTS = [Prompt(0, "a", [], "1+1?", "2"), Prompt(1, "b", [], "1+2?", "3")]


def groups(found, completions=3, **sampling):
    return sorted(found.graded_groups(PROMPTS, completions, Sampling(9, **sampling)), key=lambda g: g.prompt.index)


def test_answers_are_asked_for_and_graded(server, grader, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    a, b = groups(endpoint(server, grader), temperature=0.6, top_p=0.9, seed=5)
    assert a.correct == [True] * 3
    assert b.correct == [False] * 3
    assert a.completions[0].tokens == 7
    assert not a.completions[0].truncated
    assert len(server.asked) == 6
    for body in server.asked:
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert body["messages"][1]["content"].endswith("?\n\nBox it.")
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.6, 0.9, 9)
    assert len({body["seed"] for body in server.asked}) == 6
    assert set(server.keys) == {"Bearer secret"}
    first = sorted(body["seed"] for body in server.asked)
    server.asked.clear()
    groups(endpoint(server, grader), seed=5)
    assert sorted(body["seed"] for body in server.asked) == first


def test_a_cut_completion_is_truncated(server, grader):
    server.finish = "length"
    assert all(completion.truncated for group in groups(endpoint(server, grader)) for completion in group.completions)


def test_passing_faults_are_asked_again(server, grader):
    server.failures = [429, 503, "hang up"]
    assert len(groups(endpoint(server, grader))) == 2
    assert len(server.asked) == 9


def test_lasting_faults_end_the_evaluation(server, grader):
    server.failures = [500] * 100
    with pytest.raises(EndpointError, match="after 3 tries: HTTP 500"):
        groups(endpoint(server, grader, retries=2))


def test_a_refusal_is_not_asked_again(server, grader):
    server.failures = [400]
    with pytest.raises(EndpointError, match="after 1 tries: HTTP 400"):
        groups(endpoint(server, grader, concurrency=1), completions=1)


def test_what_is_not_served_is_refused(server, grader):
    with pytest.raises(InputError, match="serves tiny; name one of them"):
        Endpoint(server.url, "large", Messages(None, ""), grader)
    assert Endpoint(server.url, None, Messages(None, ""), grader).model == "tiny"
    with pytest.raises(InputError, match="no server to evaluate"):
        Endpoint("http://127.0.0.1:9/v1", None, Messages(None, ""), grader)
    with pytest.raises(InputError, match="must start with http"):
        Endpoint("127.0.0.1", None, Messages(None, ""), grader)


def test_the_command_evaluates_a_server_and_goes_on_where_it_failed(server, tmp_path):
    data = tmp_path / "two.jsonl"
    rows = [{"id": str(n), "problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"benchmarks": [str(data)], "engine": "endpoint", "url": server.url, "slots": 1, "output": tmp_path / "out"}
    quiet = Console(quiet=True)
    server.failures = [400, None]
    with pytest.raises(EndpointError):
        launch_evaluation(Request(**asked), quiet)
    assert launch_evaluation(Request(**asked, resume=True), quiet)
    found = read_rows(tmp_path / "out" / "two.jsonl")
    assert [row["correct"] for row in found] == [False, True, False]
    assert {row["tokens"] for row in found} == {7}
    manifest = read_manifest(tmp_path / "out")
    assert manifest.attempts == 2
    assert manifest.model.files == {}
    assert manifest.engine.url == server.url
    assert launch_evaluation(Request(manifest=tmp_path / "out", output=tmp_path / "again"), quiet)
