"""Tasks of the evaluation harness lm-eval, run on models that are loaded already."""

import copy
import io
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.measure.answers import Answers
from divergent_tokens.models import Model
from divergent_tokens.quiet import one_line, quietly
from divergent_tokens.task_files import find_tasks
from divergent_tokens.task_samples import answers_of

BATCH_SIZE = 8
N_DRAWS = 1000
"""Of the harness's bootstrap, for errors that have no formula (of perplexities, say); its own
default is 100,000, which takes minutes."""
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""The harness's own: with others few-shot examples would be others."""
_SMALLER = "if memory ran out, take a smaller --batch-size"
_LOGGERS = ("lm_eval", "datasets", "evaluate", "fsspec")


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks with their data, ready to be asked of any number of models."""

    loaded: Mapping[str, Any]
    """The harness's own Tasks and Groups, as its TaskManager gives them."""
    num_fewshot: int | None
    limit: float | None
    chat: bool
    batch_size: int

    @property
    def settings(self) -> dict[str, Any]:
        """What the harness was told, for the record."""
        return {
            "harness": f"lm-eval {version('lm-eval')}",
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "chat": self.chat,
        }

    def __call__(self, model: Model) -> tuple[Answers, ...]:
        """The model's answers by every metric of every task and group.

        The network, its tokenizer and the state of every random generator are afterwards as they
        were. Raises DivergentTokensError for what the harness cannot do with the model.
        """
        self._check(model)
        with _undisturbed(), _untied(model), _harness(model.reference, _SMALLER):
            from lm_eval.evaluator import evaluate
            from lm_eval.models.huggingface import HFLM

            asked = HFLM(
                pretrained=model.network,
                tokenizer=copy.deepcopy(model.tokenizer),  # it is given a padding token and more
                batch_size=self.batch_size,
            )
            asked._device = model.device  # the network's own is "meta" where layers wait elsewhere
            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(seed=SEEDS["fewshot"])
            results = evaluate(
                lm=asked,
                task_dict=self.loaded,
                limit=self.limit,
                bootstrap_iters=N_DRAWS,
                apply_chat_template=self.chat,
                fewshot_as_multiturn=self.chat,
            )
            return answers_of(results, self.loaded)

    def _check(self, model: Model) -> None:
        if self.chat and not getattr(model.tokenizer, "chat_template", None):
            raise DivergentTokensError(
                f"{model.reference}: its tokenizer has no chat template; leave out --chat"
            )
        if model.tokenizer.eos_token_id is None:
            raise DivergentTokensError(
                f"{model.reference}: its tokenizer has no end-of-sequence token, which lm-eval "
                "needs; set `eos_token` in its tokenizer_config.json"
            )


def read_tasks(
    names: Sequence[str],
    *,
    paths: Sequence[Path] = (),
    num_fewshot: int | None = None,
    limit: float | None = None,
    chat: bool = False,
    batch_size: int | None = None,
) -> HarnessTasks:
    """The harness's tasks of these names, with their documents.

    A name is that of a task, a group or a tag, one with wildcards (`mmlu_*`), or the path of a
    `.yaml` file; `paths` are folders with definitions of one's own, which go before the harness's.
    A definition may run Python that lies beside it (`!function`): read only what you trust.
    `num_fewshot`, where given, stands in for the tasks' own; `limit` is a number of documents of
    each task, or a share below 1. With `chat` prompts go through the chat template.

    Raises DivergentTokensError without lm-eval, and for tasks that are unknown, cannot be read or
    lack their data.
    """
    if find_spec("lm_eval") is None:
        raise DivergentTokensError(
            "tasks are run by lm-eval, which is not installed; install it with "
            "`pip install 'divergent-tokens[eval]'`"
        )
    check_settings(names, paths, num_fewshot, limit)
    with _undisturbed():
        loaded = find_tasks(names, paths)
        for name, task in loaded["tasks"].items():
            _prepare(name, task, num_fewshot)
    return HarnessTasks(loaded, num_fewshot, limit, chat, batch_size or BATCH_SIZE)


def check_settings(
    names: Sequence[str], paths: Sequence[Path], num_fewshot: int | None, limit: float | None
) -> None:
    """Raise DivergentTokensError for what no task could be run with."""
    if not names:
        raise DivergentTokensError(
            "no task is named; expected names as in arc_easy,hellaswag, or a .yaml file"
        )
    for path in paths:
        if not path.is_dir():
            raise DivergentTokensError(
                f"the task path {path} is no folder; expected one with tasks' .yaml files (a "
                "single file can be named as a task)"
            )
    if num_fewshot is not None and num_fewshot < 0:
        raise DivergentTokensError(f"{num_fewshot} few-shot examples; expected a number from 0 on")
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise DivergentTokensError(
            f"the limit {limit:g} leaves no documents that could be counted; expected a number "
            "of documents from 1 on, or a share between 0 and 1"
        )


def _prepare(name: str, task: Any, num_fewshot: int | None) -> None:
    """Set the few-shot examples as the harness does; raise for a task that cannot be run."""
    if getattr(task, "UNSAFE_CODE", False):
        raise DivergentTokensError(
            f"the task {name} runs code that the model writes, which is not done here; run it by "
            "lm-eval itself, in a sandbox"
        )
    if getattr(task, "MULTIMODAL", False):
        raise DivergentTokensError(
            f"the task {name} shows pictures or plays sounds, and the models here read text only; "
            "leave it out"
        )
    own = task.get_config("num_fewshot")
    # A definition that says 0 means it: its prompt would not read well with examples.
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=SEEDS["fewshot"])
    n = task.get_config("num_fewshot")
    check = "check its definition"
    if n:
        check += f", and whether its data has {n} examples to show beside the question"
    with _harness(f"the task {name}", check):  # one prompt, so that what is wrong is found now
        task.build_all_requests(limit=1, rank=0, world_size=1)


@contextmanager
def _harness(asked: str, advice: str) -> Iterator[None]:
    """What goes wrong in the harness comes out as one message."""
    try:
        yield
    except Exception as error:
        raise DivergentTokensError(
            f"{asked}: lm-eval {version('lm-eval')} stopped ({type(error).__name__}: "
            f"{one_line(error)}); {advice}"
        ) from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The harness's seeds and silence inside; afterwards everything is as it was."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    environment = dict(os.environ)
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (the harness's)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        # One process: forking one that holds a network and its threads may never end.
        os.environ["DISABLE_MULTIPROC"] = "1"
        with quietly(), redirect_stdout(io.StringIO()), torch.random.fork_rng():
            random.seed(SEEDS["random"])
            np.random.seed(SEEDS["numpy"])  # noqa: NPY002
            torch.manual_seed(SEEDS["torch"])
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _untied(model: Model) -> Iterator[None]:
    """The harness ties a network's weights again, which would undo what a candidate untied."""
    network: Any = model.network
    network.tie_weights = lambda *_args, **_settings: None
    try:
        yield
    finally:
        del network.tie_weights
