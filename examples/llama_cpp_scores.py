"""Score a base's completions with llama.cpp: is this GGUF still the same model?

    dtm complete demo:smollm2 --n-prompts 8 --prefix 32 --new-tokens 32 --out completions.jsonl
    python examples/llama_cpp_scores.py completions.jsonl --model model.gguf --out scores.jsonl
    dtm compare demo:smollm2 --n-prompts 8 --prefix 32 --new-tokens 32 \\
        --scores llama.cpp=scores.jsonl

Each prompt with its completion is one call of `eval`; no text is generated. Needs numpy and
llama-cpp-python (written for 0.3.36, and run with it).

What was seen with these commands, with the GGUF that demo:smollm2 is read from (SmolLM2-135M in
Q4_1; dtm dequantizes its weights to float32, llama.cpp multiplies them with activations rounded to
8 bits): 4 of 8 completions are the same, FDT is 23.5 of 32, 7 of 256 tokens differ, and DPPL is
2.61 where the base's own is 2.60. The base's margins at the four first divergences are 0.003,
0.007, 0.080 and 0.128 logits. So the arithmetic differs, and the model is the same.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray


def scored(line: dict[str, Any], logits: NDArray[np.floating]) -> dict[str, Any]:
    """The line of one prompt with the model's choice and log-probabilities added.

    `logits` are [token, vocab], a row for each token of prompt and completion: what the model
    expects *after* it. So the row before a completion's token is the one that tells of it.
    """
    completion = np.array(line["completion_ids"])
    first = len(line["prompt_ids"]) - 1
    rows = logits[first : first + len(completion)].astype(np.float64)  # [completion token, vocab]
    rows -= rows.max(1, keepdims=True)
    logprobs = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    choices = logprobs.argmax(1)  # the lowest id where two are level, as in dtm
    t = np.arange(len(completion))
    own = logprobs[t, choices].tolist()
    return line | {
        "argmax_ids": choices.tolist(),
        "logprobs": logprobs[t, completion].tolist(),
        "top_logprobs": [[[c, q]] for c, q in zip(choices.tolist(), own, strict=True)],
    }


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
    """Read completions, score them one by one, write the scores."""
    parser = argparse.ArgumentParser(description="Score completions.jsonl with llama.cpp.")
    parser.add_argument("completions", type=Path, help="what dtm complete wrote")
    parser.add_argument("--model", required=True, help="a GGUF file of the model to score with")
    parser.add_argument("--out", type=Path, default=Path("scores.jsonl"), help="%(default)s")
    parser.add_argument("--threads", type=int, help="llama.cpp's own choice if left out")
    parser.add_argument("--gpu-layers", type=int, default=0, help="layers on a GPU, -1 for all")
    args = parser.parse_args()
    lines = read_completions(args.completions)
    if not args.out.resolve().parent.is_dir():
        fail(f"there is no folder for {args.out}; make it first")
    try:
        from llama_cpp import Llama
    except ImportError as error:
        fail(f"llama-cpp-python is needed ({error}); pip install llama-cpp-python")
    longest = max(len(line["prompt_ids"]) + len(line["completion_ids"]) for line in lines)
    try:
        model = Llama(
            args.model,
            n_ctx=longest,
            logits_all=True,  # without it only the last token has any
            n_threads=args.threads,
            n_gpu_layers=args.gpu_layers,
            verbose=False,
        )
    except ValueError as error:
        fail(f"{args.model}: {error}")
    highest = max(max(line["prompt_ids"] + line["completion_ids"]) for line in lines)
    if highest >= model.n_vocab():
        fail(f"{args.model} has {model.n_vocab()} tokens, none is {highest}; is it the same model?")
    rows = []
    for line in lines:
        ids = line["prompt_ids"] + line["completion_ids"]
        model.reset()
        model.eval(ids)
        rows.append(scored(line, model.scores[: len(ids)]))
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} prompts scored: {args.out}")


def fail(message: str) -> NoReturn:
    """End with one message."""
    print(f"llama_cpp_scores: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
