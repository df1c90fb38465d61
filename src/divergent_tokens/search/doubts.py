"""Which of a sweep's numbers a plan hangs on and are not sure: those that are worth measuring."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from divergent_tokens.search.budgets import Budget
from divergent_tokens.search.forecasts import picked
from divergent_tokens.search.options import read_options
from divergent_tokens.search.selections import select
from divergent_tokens.search.settings import Settings

if TYPE_CHECKING:
    from divergent_tokens.sensitivities import Pair, Sensitivities

RARE = 0.05
"""A scheme that fewer resamples than this share give a component is none of its candidates."""
LARGE_KL = 0.1
"""Of one component, in nats per token: from here on a second-order estimate wants checking."""


@dataclass(frozen=True)
class Doubts:
    """What may change a plan."""

    chosen: dict[str, str]
    """The plan as it is: component name -> scheme."""
    pairs: "tuple[Pair, ...]"
    """In doubt and not measured yet, the most harmful first."""
    n_unsure: int
    """Components that resamples over prompts give more than one scheme."""
    sureness: float
    """Share of decisions, over components and resamples, that are as the plan has them."""


def doubts(sensitivities: "Sensitivities", budget: Budget, settings: Settings) -> Doubts:
    """The doubts about the plan of least harm that meets the budget.

    A component is in doubt if resamples over prompts give it several schemes, and then each of
    those schemes is; or if its scheme's KL is large. What was measured is known as well as these
    prompts can tell, and is not in doubt any more.
    """
    options = read_options(
        sensitivities,
        schemes=settings.schemes,
        method=settings.method,
        coupling=settings.coupling,
    )
    chosen = select(options, budget).options
    shares = picked(
        options, lambda harm: select(options, budget, harm).options, seed=settings.seed
    )  # [group, option]
    at = np.arange(len(chosen)), chosen
    likely = shares >= RARE
    likely[at] = True
    unsure = likely.sum(1) > 1  # [group]
    wanted = likely & unsure[:, np.newaxis]
    wanted[at] |= options.harm[at] >= LARGE_KL
    pairs = {
        (options.names[member], options.schemes[option - 1]): float(options.harm[group, option])
        for group, option in np.argwhere(wanted).tolist()
        if option > 0
        for member in options.groups[group]
    }
    measured = {(r.component, r.scheme) for r in sensitivities.rows if r.method == "measure"}
    return Doubts(
        chosen=options.schemes_of(chosen),
        pairs=tuple(sorted(pairs.keys() - measured, key=lambda pair: (-pairs[pair], pair))),
        n_unsure=int(options.n_members[unsure].sum()),
        sureness=float(shares[at] @ options.n_members / len(options.names)),
    )
