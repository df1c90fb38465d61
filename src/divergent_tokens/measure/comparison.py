"""A base compared with its candidates, on the same prompts and against the same noise floor."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divergent_tokens.errors import DivergentTokensError, ModelError
from divergent_tokens.measure import metrics
from divergent_tokens.measure.answers import Answers, TaskResult, Tasks, compare_answers
from divergent_tokens.measure.batches import BatchSize, first_batch_size
from divergent_tokens.measure.completions import Completions, check_positions, complete
from divergent_tokens.measure.engine import EngineScores, read_scores
from divergent_tokens.measure.examples import Example, write_examples
from divergent_tokens.measure.head import Head, find_head, kept_head
from divergent_tokens.measure.metrics import Divergence, divergence
from divergent_tokens.measure.pairs import Pair, compare_pairs
from divergent_tokens.measure.perplexity import perplexity
from divergent_tokens.measure.pieces import pieces
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.prompts import PromptSet
from divergent_tokens.measure.rounding import lent_rounding
from divergent_tokens.measure.rows import Row, TokenArrays, rows_of
from divergent_tokens.measure.scores import TokenScores, logprobs_of, score, score_base
from divergent_tokens.measure.states import States, base_states
from divergent_tokens.measure.summaries import Metrics, summarize
from divergent_tokens.models import Model, check_same_vocabulary

SCHEMA = "divergent-tokens/comparison/1"


@dataclass(frozen=True)
class CandidateResult:
    """All that was found out about one candidate."""

    name: str
    divergence: Divergence
    """Token by token; what the rest is made of."""
    metrics: Metrics
    rows: tuple[Row, ...]
    examples: tuple[Example, ...] = ()
    tasks: tuple[TaskResult, ...] | None = None
    """None where no task was run: none was given, or there are another engine's scores only."""


@dataclass(frozen=True)
class BaseTasks:
    """What every candidate's answers are held against."""

    settings: Mapping[str, Any]
    base: tuple[Answers, ...]
    rounding: tuple[TaskResult, ...]
    """The base's answers after the flip of bits that `Comparison.rounding` is about."""

    def to_json(self) -> dict[str, Any]:
        """The TASKS of comparison.json."""
        return {
            "settings": dict(self.settings),
            "base": [answers.to_json() | {"flips": None} for answers in self.base],
            "rounding": [result.to_json() for result in self.rounding],
        }


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `to_json` is the content of comparison.json."""

    base: Model
    completions: Completions
    margins: NDArray[np.float32]
    """The base's margins. [prompt, token]"""
    noise_floor: Metrics
    """The base against its own completions."""
    rounding: Metrics
    """The base after a flip of the lowest bits of its first layer."""
    candidates: tuple[CandidateResult, ...]
    level: float
    seed: int
    command: tuple[str, ...] = ()
    tasks: BaseTasks | None = None

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Every two candidates; found when asked for, since a hundred plans make 4,950 pairs."""
        return compare_pairs(
            {found.name: np.array([row.fdt for row in found.rows]) for found in self.candidates},
            self.completions.lengths,
            level=self.level,
            seed=self.seed,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values in the form of the JSON Schema that comes with the package."""
        return {
            "schema": SCHEMA,
            "versions": versions(),
            "command": list(self.command),
            "seed": self.seed,
            "base": {
                "reference": self.base.reference,
                "fingerprint": self.base.fingerprint,
                "dtype": self.base.dtype_name,
                "device": str(self.base.device),
            },
            "prompts": self._prompts_json(),
            "noise_floor": self.noise_floor.to_json(),
            "rounding": self.rounding.to_json(),
            "candidates": [
                {
                    "name": candidate.name,
                    "metrics": candidate.metrics.to_json(),
                    "rows": [vars(row) for row in candidate.rows],
                    "examples": [vars(example) for example in candidate.examples],
                    "tasks": None
                    if candidate.tasks is None
                    else [result.to_json() for result in candidate.tasks],
                }
                for candidate in self.candidates
            ],
            "pairs": [pair.to_json() for pair in self.pairs],
            "tasks": None if self.tasks is None else self.tasks.to_json(),
        }

    def _decode(self, ids: list[int]) -> str:
        return str(self.base.tokenizer.decode(ids))

    def _prompts_json(self) -> dict[str, Any]:
        c = self.completions
        return {
            "source": c.prompts.source,
            "digest": c.prompts.digest,
            "n_prompts": len(c.prompts),
            "left_out": c.prompts.left_out,
            "skipped": c.prompts.skipped,
            "wanted": c.prompts.wanted,
            "prefix": c.prompts.prefix,
            "new_tokens": c.new_tokens,
            "ignore_eos": c.ignore_eos,
            "decoding": c.decoding,
            "texts": [prompt.text for prompt in c.prompts.prompts],
            "completions": [
                pieces(self._decode, row[:length].tolist())
                for row, length in zip(c.ids, c.lengths, strict=True)
            ],
            "margins": [
                [round(float(m), 4) for m in row[:length]]
                for row, length in zip(self.margins, c.lengths, strict=True)
            ],
        }


def compare(
    base: Model,
    candidates: Mapping[str, AbstractContextManager[Model]],
    prompts: PromptSet,
    *,
    scores: Mapping[str, Path] | None = None,
    new_tokens: int = 128,
    ignore_eos: bool = False,
    by_vllm: bool = False,
    text: str | None = None,
    n_examples: int = 0,
    tasks: Tasks | None = None,
    level: float = 0.95,
    seed: int = 0,
    batch_size: int | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
    command: Sequence[str] = (),
) -> Comparison:
    """How far each candidate has moved from the base, on the base's completions of the prompts.

    A candidate is a context manager that yields its model; it is entered once, and left before the
    next: weights that are lent, or a checkpoint that is loaded for the while. `scores` are files
    that another engine made. With a `text`, its perplexity is measured too. The `n_examples`
    earliest divergences are written out, the only text that a candidate generates beside what
    `tasks` ask of it (see divergent_tokens.tasks).
    """
    scores = scores or {}
    if not candidates and not scores:
        raise DivergentTokensError(
            "there is no candidate to compare with the base; give a model, a scheme or scores"
        )
    twice = candidates.keys() & scores.keys()
    if twice:
        raise DivergentTokensError(
            f"two candidates are called {min(twice)!r}; name the scores otherwise"
        )
    # First: where a task fails it does so before anything else has been waited for.
    answers = None if tasks is None else _answers("base", base, tasks, progress)
    completions = complete(
        base,
        prompts,
        new_tokens=new_tokens,
        ignore_eos=ignore_eos,
        batch_size=batch_size,
        by_vllm=by_vllm,
        cache=cache,
        progress=progress,
    )
    engines = {
        name: read_scores(path, completions, vocabulary_size=base.vocabulary_size)
        for name, path in scores.items()
    }
    head = find_head(base.network)
    size = BatchSize(batch_size) if batch_size else first_batch_size(base.device)
    states = base_states(base, head, completions, batch_size=size, cache=cache, progress=progress)
    own = score_base(base, head, completions, states)
    first = _first_logits(base, head, states)
    kept = kept_head(head, states.of(0, base.device)[:1])
    run = _Run(
        base=base,
        head=head,
        kept_head=kept,
        completions=completions,
        states=states,
        own=own,
        first_logits=first,
        text=text,
        n_examples=n_examples,
        tasks=tasks,
        answers=answers,
        level=level,
        seed=seed,
        progress=progress,
    )
    floor = run.summary(divergence_of(own, completions), run.perplexity("base", base, head))
    with lent_rounding(base, seed=seed) as rounded:
        rounding = run.measure("rounding", rounded)
    results = [run.candidate(name, candidate) for name, candidate in candidates.items()]
    results += [run.engine(name, engine) for name, engine in engines.items()]
    return Comparison(
        base=base,
        completions=completions,
        margins=own.margins,
        noise_floor=floor,
        rounding=rounding.metrics,
        candidates=tuple(results),
        level=level,
        seed=seed,
        command=tuple(command),
        tasks=BaseTasks(tasks.settings, answers, rounding.tasks)
        if tasks and answers and rounding.tasks
        else None,
    )


@dataclass(frozen=True)
class _Run:
    """What every candidate of one comparison shares."""

    base: Model
    head: Head
    """Of the base's network as it is at any moment."""
    kept_head: Head
    """The base's own, also while its weights are lent to a candidate."""
    completions: Completions
    states: States
    own: TokenScores
    """The base's scores of its own completions."""
    first_logits: Tensor
    """The base's, for the first completion's first token; see `measure`. [vocab]"""
    text: str | None
    n_examples: int
    tasks: Tasks | None
    answers: tuple[Answers, ...] | None
    """The base's own to the tasks."""
    level: float
    seed: int
    progress: Progress

    def candidate(self, name: str, candidate: AbstractContextManager[Model]) -> CandidateResult:
        """Its own frame, so that no name holds one candidate while the next is loaded."""
        with candidate as model:
            if model.network is not self.base.network:
                check_same_vocabulary(self.base, model)
            if model.device != self.base.device:
                raise ModelError(
                    f"candidate {name} is on {model.device} and the base on {self.base.device}; "
                    "load both on one device"
                )
            longest = self.completions.ids.shape[1]
            check_positions(model, self.completions.prompts, longest)
            return self.measure(name, model)

    def measure(self, name: str, model: Model) -> CandidateResult:
        shared = model.network is self.base.network
        head = self.head if shared else find_head(model.network)
        if shared and not torch.equal(
            _first_logits(self.base, self.kept_head, self.states), self.first_logits
        ):
            raise ModelError(
                f"{name} overwrites weights of the head in the base's own network, which makes the "
                "base's logits too; give its parameters other storage (`parameter.data = ...`), or "
                "load the candidate as a network of its own"
            )
        scores = score(
            model,
            head,
            self.completions,
            self.kept_head,
            self.states,
            name=name,
            progress=self.progress,
        )
        arrays = TokenArrays(
            argmax_ids=scores.argmax_ids,
            margins=self.own.margins,
            base_logprobs=self.own.logprobs,
            logprobs=scores.logprobs,
            base_argmax_logprobs=scores.base_argmax_logprobs,
            argmax_logprobs=scores.argmax_logprobs,
        )
        ppl = self.perplexity(name, model, head)
        return self._result(name, divergence_of(scores, self.completions), arrays, model, ppl)

    def engine(self, name: str, engine: EngineScores) -> CandidateResult:
        found = divergence(
            engine.argmax_ids,
            self.completions.ids,
            self.completions.mask,
            logprobs=engine.logprobs,
            base_logprobs=self.own.logprobs,
        )
        arrays = TokenArrays(
            argmax_ids=engine.argmax_ids,
            margins=self.own.margins,
            base_logprobs=self.own.logprobs,
            logprobs=engine.logprobs,
            base_argmax_logprobs=logprobs_of(
                engine.argmax_ids, self.base, self.head, self.completions, self.states
            ),
            argmax_logprobs=engine.argmax_logprobs,
        )
        return self._result(name, found, arrays, None, None)

    def _result(
        self,
        name: str,
        found: Divergence,
        arrays: TokenArrays,
        model: Model | None,
        ppl: dict[str, Any] | None,
    ) -> CandidateResult:
        examples = write_examples(
            found,
            arrays.argmax_ids,
            self.own.margins,
            self.completions,
            self.base,
            model,
            n=self.n_examples,
        )
        rows = rows_of(found, arrays, self.completions, self.base.tokenizer)
        tasks = None if model is None else self.task_results(name, model)
        return CandidateResult(name, found, self.summary(found, ppl), rows, examples, tasks)

    def task_results(self, name: str, model: Model) -> tuple[TaskResult, ...] | None:
        if self.tasks is None or self.answers is None:
            return None
        answers = _answers(name, model, self.tasks, self.progress)
        return compare_answers(self.answers, answers, level=self.level, seed=self.seed)

    def summary(self, found: Divergence, ppl: dict[str, Any] | None) -> Metrics:
        prompts = self.completions.prompts.prompts
        at_first = [
            None if censored else float(self.own.margins[i, t])
            for i, (t, censored) in enumerate(zip(found.fdt, found.censored, strict=True))
        ]
        return summarize(
            found,
            at_first,
            metrics.repeated(self.completions.ids, self.completions.mask),
            level=self.level,
            seed=self.seed,
            domains=[prompt.domain for prompt in prompts],
            languages=[prompt.language for prompt in prompts],
            ppl=ppl,
        )

    def perplexity(self, name: str, model: Model, head: Head) -> dict[str, Any] | None:
        if self.text is None:
            return None
        found = perplexity(
            model,
            head,
            self.text,
            context=self.completions.prompts.prefix or 64,
            tokenizer=self.base.tokenizer,
            batch_size=self.states.batch_size,
            name=f"{name}, text",
            progress=self.progress,
        )
        return found.to_json(level=self.level, seed=self.seed)


def _answers(name: str, model: Model, tasks: Tasks, progress: Progress) -> tuple[Answers, ...]:
    progress(f"{name}, tasks", 0, 1, "models")
    answers = tuple(tasks(model))
    progress(f"{name}, tasks", 1, 1, "models")
    return answers


@torch.no_grad()
def _first_logits(base: Model, head: Head, states: States) -> Tensor:
    """Logits of the first completion's first token by the base's head as it is now. [vocab]"""
    return head.logits(states.of(0, base.device)[:1])[0]


def divergence_of(scores: TokenScores, completions: Completions) -> Divergence:
    """Each prompt's sums and counts from a candidate's token scores."""
    return divergence(
        scores.argmax_ids,
        completions.ids,
        completions.mask,
        logprobs=scores.logprobs,
        base_logprobs=scores.base_logprobs,
        kl=scores.kl,
        acceptance=scores.acceptance,
    )


def versions() -> dict[str, str]:
    """The versions of what the numbers come from."""
    names = ("divergent-tokens", "torch", "transformers", "numpy", "scipy")
    return {name: version(name) for name in names}
