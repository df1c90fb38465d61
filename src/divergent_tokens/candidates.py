"""Candidates by name: schemes laid over the base for a while, checkpoints loaded for a while."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from divergent_tokens import gguf_files, model_files
from divergent_tokens.calibrated import ready_plans
from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.components import Component, find_components
from divergent_tokens.compress.plan import Plan, check_plan, uniform_plan
from divergent_tokens.compress.plan_file import check_base, read_plan
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import DivergentTokensError, SchemeError
from divergent_tokens.models import Model, load_model
from divergent_tokens.network_checks import refuse_unknown


class Candidate:
    """A model for a while, as often as it is asked for: `with candidate as model: ...`."""

    def __init__(self, lend: Callable[[], AbstractContextManager[Model]]) -> None:
        """Call `lend` each time the candidate is entered."""
        self._lend = lend
        self._open: list[AbstractContextManager[Model]] = []

    def __enter__(self) -> Model:
        """The model, until the block ends."""
        opened = self._lend()
        model = opened.__enter__()
        self._open.append(opened)
        return model

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give it back."""
        self._open.pop().__exit__(kind, error, trace)


Candidates = dict[str, Candidate]


def scheme_candidates(
    base: Model,
    *schemes: str,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: str = "builtin",
    cache: Path | None = None,
) -> Candidates:
    """The base with every component (or those that match) under each scheme, by the scheme's text.

    The weights are lent: each comes back bit for bit before the next is made. What is made from
    the base's inputs on a `calibration` source (GPTQ's codes) is made here, and kept in `cache`.
    Raises SchemeError at once for a scheme that is unknown or does not fit a component.
    """
    parsed = [parse_scheme(text) for text in schemes]
    check_names(*map(str, parsed))
    components = find_components(base.network, include=include, exclude=exclude)
    plans = {str(scheme): uniform_plan(components, scheme) for scheme in parsed}
    return lent_candidates(base, plans, components, calibration=calibration, cache=cache)


def plan_candidates(
    base: Model,
    *paths: str | Path,
    calibration: str = "builtin",
    cache: Path | None = None,
) -> Candidates:
    """The base under each plan, by the name of the plan's file; the weights are lent.

    Raises RecordError or SchemeError at once, naming the file, for one that holds no plan that
    fits this base.
    """
    check_names(*map(str, paths))
    components = find_components(base.network, include=["*"])
    plans = {}
    for path in map(Path, paths):
        file = read_plan(path)
        check_base(file, base, path)
        plans[str(path)] = file.plan()
        try:
            check_plan(plans[str(path)], components)
        except SchemeError as error:
            raise SchemeError(f"{path}: {error}") from error
    return lent_candidates(base, plans, components, calibration=calibration, cache=cache)


def lent_candidates(
    base: Model,
    plans: Mapping[str, Plan],
    components: Sequence[Component],
    *,
    calibration: str = "builtin",
    cache: Path | None = None,
) -> Candidates:
    """The base under each plan, by its name.

    Raises SchemeError at once, if a plan does not fit the base's components.
    """
    for plan in plans.values():
        check_plan(plan, components)
    ready = ready_plans(base, components, plans, source=calibration, cache=cache)
    return {
        name: Candidate(partial(lent_plan, base, plan, components=components))
        for name, plan in ready.items()
    }


def model_candidates(
    *references: str,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    max_memory: int | None = None,
    cache: Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Candidates:
    """Checkpoints, each loaded when it is its turn and let go of before the next.

    Give the dtype and device that the base runs in: rounding in another would be counted as harm.

    Raises ModelError at once for what is not there, is not whole, or asks for what is not allowed,
    as far as that can be seen without loading it.
    """
    check_names(*references)
    for reference in references:
        _check_there(reference, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)

    @contextmanager
    def loaded(reference: str) -> Iterator[Model]:
        gc.collect()  # networks hold cycles, and the last one's room is needed
        yield load_model(
            reference,
            dtype=dtype,
            device=device,
            max_memory=max_memory,
            cache=cache,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )

    return {reference: Candidate(partial(loaded, reference)) for reference in references}


def joined(*groups: Candidates) -> Candidates:
    """All candidates under one roof; a name that two of them bear is an error."""
    check_names(*(name for group in groups for name in group))
    return {name: candidate for group in groups for name, candidate in group.items()}


def check_names(*names: str) -> None:
    """Raise DivergentTokensError for a name that two candidates bear."""
    for name in names:
        if names.count(name) > 1:
            raise DivergentTokensError(
                f"two candidates are called {name!r}; give each once, under its own name"
            )


def _check_there(reference: str, *, allow_pickle: bool, trust_remote_code: bool) -> None:
    """Raise ModelError for what load_model would refuse by a checkpoint's files alone."""
    if reference == gguf_files.DEMO:
        gguf_files.demo_file()
        return
    path = model_files.find_model(reference)
    if path.is_file():
        gguf_files.check_gguf(path, reference)
        return
    config = model_files.read_config(path, reference)
    refuse_unknown(config, reference, trust_remote_code=trust_remote_code)
    model_files.find_tokenizer(path, reference)
    if Path(reference).expanduser().is_dir():  # a hub id's weights are downloaded at its turn
        model_files.find_weights(path, reference, config, allow_pickle=allow_pickle)
