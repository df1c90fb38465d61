"""Score a base's completions with vLLM: is this server the same model?

    dtm complete BASE --out completions.jsonl
    python examples/vllm_scores.py completions.jsonl --model MODEL --out scores.jsonl
    dtm compare BASE --scores vllm=scores.jsonl

Or ask a server that runs already (`vllm serve MODEL --no-enable-prefix-caching`):

    python examples/vllm_scores.py completions.jsonl --model MODEL --url http://localhost:8000/v1

Prompt and completion together are the engine's prompt, and `prompt_logprobs` asks for the k most
likely tokens at each of its positions, and for the token that stands there. One token is generated
and thrown away: vLLM generates one at least.

Written for vLLM 0.20, after its documentation and source; not run by us. The calls used here are
the same in its documentation since 0.10. Two things to know. Prefix caching is off: with it,
log-probabilities were seen to depend on the order of the requests (vLLM issue 42019). And vLLM
holds the logits of a whole prefill at once: where memory runs out, lower `max_num_batched_tokens`.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


def scored(
    line: dict[str, Any], prompt_logprobs: Sequence[Mapping[Any, Any] | None]
) -> dict[str, Any]:
    """The line of one prompt with the engine's choice and log-probabilities added.

    `prompt_logprobs` has an entry for each token of prompt and completion, None for the very first:
    a mapping of token ids to objects with a `logprob`, or over HTTP of strings to dicts.
    """
    n_prompt, completion = len(line["prompt_ids"]), line["completion_ids"]
    if len(prompt_logprobs) != n_prompt + len(completion):
        fail(
            f"prompt {line['prompt']} has {n_prompt + len(completion)} tokens, the engine scored "
            f"{len(prompt_logprobs)}; it must take token ids as they are, and cut nothing off"
        )
    tops: list[list[tuple[int, float]]] = []
    for entry in prompt_logprobs[n_prompt:]:
        found = [(int(token), _logprob(value)) for token, value in (entry or {}).items()]
        # bfloat16 logits are often level; the lowest id then, as in dtm.
        tops.append(sorted(found, key=lambda pair: (-pair[1], pair[0])))
    return line | {
        "argmax_ids": [top[0][0] for top in tops],
        "logprobs": [dict(top)[token] for token, top in zip(completion, tops, strict=True)],
        "top_logprobs": [[list(pair) for pair in top] for top in tops],
    }


def _logprob(value: Any) -> float:
    return float(value["logprob"] if isinstance(value, Mapping) else value.logprob)


def ask_engine(lines: list[dict[str, Any]], model: str, k: int, dtype: str) -> Iterator[Any]:
    """The prompt_logprobs of every line, from an engine of our own."""
    try:
        from vllm import LLM, SamplingParams, TokensPrompt
    except ImportError as error:
        fail(f"vLLM is needed ({error}); pip install vllm, or name a server with --url")
    longest = max(len(ids_of(line)) for line in lines)
    engine = LLM(
        model=model,
        dtype=dtype,
        max_model_len=longest + 1,
        max_logprobs=max(k, 20),  # 20 is its default
        enable_prefix_caching=False,
    )
    outputs = engine.generate(
        [TokensPrompt(prompt_token_ids=ids_of(line)) for line in lines],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=k),
    )
    for output in outputs:  # in the order of the prompts
        yield output.prompt_logprobs


def ask_server(lines: list[dict[str, Any]], model: str, k: int, url: str) -> Iterator[Any]:
    """The prompt_logprobs of every line, from vLLM's OpenAI-compatible server."""
    for line in lines:
        body = {
            "model": model,
            "prompt": ids_of(line),
            "temperature": 0,
            "max_tokens": 1,
            "prompt_logprobs": k,
        }
        request = urllib.request.Request(
            f"{url.rstrip('/')}/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                choice = json.load(response)["choices"][0]
        except urllib.error.HTTPError as error:
            fail(f"{url} refused prompt {line['prompt']}: {error} {error.read().decode()[:300]}")
        except (OSError, ValueError) as error:
            fail(f"{url} cannot be asked: {error}")
        if choice.get("prompt_logprobs") is None:
            fail(f"{url} gives no prompt_logprobs; that is an extension of vLLM's server")
        yield choice["prompt_logprobs"]


def ids_of(line: dict[str, Any]) -> list[int]:
    """Prompt and completion as one list of token ids."""
    return [*line["prompt_ids"], *line["completion_ids"]]


def read_completions(path: Path) -> list[dict[str, Any]]:
    """The lines that `dtm complete` wrote."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read as JSON lines: {error}")
    wanted = {"prompt", "prompt_ids", "completion_ids"}
    if not lines or not all(isinstance(line, dict) and line.keys() >= wanted for line in lines):
        fail(f"{path} is no file of dtm complete; expected lines with {', '.join(sorted(wanted))}")
    return lines


def main() -> None:
    """Read completions, have them scored, write the scores."""
    parser = argparse.ArgumentParser(description="Score completions.jsonl with vLLM.")
    parser.add_argument("completions", type=Path, help="what dtm complete wrote")
    parser.add_argument("--model", required=True, help="the model, or its name on the server")
    parser.add_argument("--url", help="a server to ask, http://localhost:8000/v1, say")
    parser.add_argument("--out", type=Path, default=Path("scores.jsonl"), help="%(default)s")
    parser.add_argument(
        "--top", type=int, default=5, help="tokens to ask for a position (%(default)s)"
    )
    parser.add_argument("--dtype", default="auto", help="of the engine of our own (%(default)s)")
    args = parser.parse_args()
    if args.top < 1:
        fail(f"--top is {args.top}; expected 1 at least, or the engine's choice is not told")
    lines = read_completions(args.completions)
    if not args.out.resolve().parent.is_dir():
        fail(f"there is no folder for {args.out}; make it first")
    if args.url:
        answers = ask_server(lines, args.model, args.top, args.url)
    else:
        answers = ask_engine(lines, args.model, args.top, args.dtype)
    rows = [scored(line, answer) for line, answer in zip(lines, answers, strict=True)]
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} prompts scored: {args.out}")


def fail(message: str) -> NoReturn:
    """End with one message."""
    print(f"vllm_scores: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
