"""Candidates by name: schemes laid over the base for a while, and checkpoints loaded for a while."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.plan import uniform_plan
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.models import Model, load_model

Candidates = dict[str, AbstractContextManager[Model]]


def scheme_candidates(
    base: Model, *schemes: str, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Candidates:
    """The base with every component (or those that match) under each scheme, named by the scheme's text.

    The weights are lent: each comes back bit for bit before the next is made.
    Raises SchemeError at once for a scheme that is unknown or does not fit a component.
    """
    components = find_components(base.network, include=include, exclude=exclude)
    plans = {str(scheme): uniform_plan(components, scheme) for scheme in map(parse_scheme, schemes)}
    return {name: lent_plan(base, plan) for name, plan in plans.items()}


def model_candidates(
    *references: str,
    dtype: str = "auto",
    device: str = "auto",
    cache: Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Candidates:
    """Checkpoints, each loaded when it is its turn and let go of before the next."""

    @contextmanager
    def loaded(reference: str) -> Iterator[Model]:
        yield load_model(
            reference,
            dtype=dtype,
            device=device,
            cache=cache,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
        gc.collect()  # networks hold cycles; the next one needs the room

    return {reference: loaded(reference) for reference in references}


def joined(*groups: Candidates) -> Candidates:
    """All candidates under one roof; a name that two of them bear is an error."""
    whole: Candidates = {}
    for group in groups:
        twice = whole.keys() & group.keys()
        if twice:
            raise DivergentTokensError(f"two candidates are called {min(twice)!r}; give each once")
        whole |= group
    return whole
