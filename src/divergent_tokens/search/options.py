"""What each component may become, at what harm and size: a sweep as the search sees it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from divergent_tokens.compress.couplings import Coupling, coupled, loadable
from divergent_tokens.errors import RecordError
from divergent_tokens.search.knapsack import Floats, Integers
from divergent_tokens.search.settings import Method, RankBy

if TYPE_CHECKING:
    from divergent_tokens.sensitivities import Sensitivities, Sensitivity

MAX_DRAWS = 2**28
"""Drawn numbers that are held at once; without them interactions are not counted."""


@dataclass(frozen=True)
class Options:
    """Harm and size of everything that can be chosen; option 0 leaves a component as it is.

    A group is one component, or several that a coupling binds to one scheme: their harms, sizes
    and nats are added up. Option j + 1 is scheme j.
    """

    names: tuple[str, ...]
    """The components, in the sweep's order."""
    schemes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    """Which components belong together, by position."""
    rank_by: RankBy
    harm: Floats
    """Infinite where a group does not have an option. [group, option]"""
    size: Integers
    """Bytes. [group, option]"""
    n_parameters: int
    """Weights of all components."""
    nats: NDArray[np.float32]
    """KL summed over a completion. [group, option, prompt]"""
    draws: NDArray[np.float32] | None
    """The probe's s, if every KL is a probed one. [group, option, prompt, draw]"""
    lengths: Integers
    """Tokens of each completion. [prompt]"""
    n_below_rounding: int
    """Measured KLs below three times the rounding floor that had to be used for want of others."""

    @property
    def base_size_bytes(self) -> int:
        """Of all components in the base."""
        return int(self.size[:, 0].sum())

    @property
    def n_members(self) -> Integers:
        """Components of each group. [group]"""
        return np.array([len(group) for group in self.groups])

    def schemes_of(self, options: Integers) -> dict[str, str]:
        """Component name -> scheme, in the sweep's order, for the chosen options [group]."""
        chosen = {
            member: self.schemes[option - 1]
            for group, option in zip(self.groups, options.tolist(), strict=True)
            for member in group
            if option > 0
        }
        return {self.names[i]: chosen[i] for i in sorted(chosen)}

    def kl_under(self, weights: Floats) -> Floats:
        """KL with every prompt counted so many times, in nats per token. [k, group, option]

        `weights` is [prompt, k]. Infinite where a group does not have an option.
        """
        n_groups, n_options, n_prompts = self.nats.shape
        flat = self.nats.reshape(-1, n_prompts) @ weights.astype(np.float32)  # [group·option, k]
        kl = (flat / (self.lengths @ weights)).T.reshape(-1, n_groups, n_options)
        return np.where(np.isfinite(self.harm), kl, np.inf)


def read_options(
    sensitivities: "Sensitivities",
    *,
    rank_by: RankBy = RankBy.kl,
    schemes: Sequence[str] = (),
    method: Method = Method.auto,
    coupling: Coupling | None = None,
) -> Options:
    """The options of a sweep: those of its schemes that are asked for and that a coupling loads.

    Harm is KL, mean length − FDT, SDT, the logarithm of DPPL or PPL above the base's own (it may
    be negative), or the weight error. Raises RecordError where the sweep lacks a row or a number,
    and SchemeError where a coupling leaves no scheme.
    """
    chosen = loadable(
        _asked_for(sensitivities, schemes), coupling, sensitivities.run["base"]["model_type"]
    )
    rows = _by_pair(sensitivities)
    components = sensitivities.components
    names = [component.name for component in components]
    groups = coupled(names, [component.kind for component in components], coupling)
    pairs = [(i, j) for i in range(len(names)) for j in range(len(chosen))]
    kls = {(i, j): _kl_row(sensitivities, rows, names[i], chosen[j], method) for i, j in pairs}
    ranked = kls
    if rank_by is not RankBy.kl:
        ranked = {at: _other_row(sensitivities, rows, row, rank_by) for at, row in kls.items()}
    harm_of = _harm_of(sensitivities, rank_by, n_schemes=len(chosen))
    group_of = {member: g for g, group in enumerate(groups) for member in group}
    shape = (len(groups), len(chosen) + 1)
    harm, size = np.zeros(shape), np.zeros(shape, np.int64)
    lengths = np.asarray(sensitivities.lengths, np.int64)
    nats = np.zeros((*shape, len(lengths)), np.float32)
    draws = _room_for_draws(sensitivities, shape, list(kls.values()))
    for i, component in enumerate(components):
        size[group_of[i], 0] += component.base_size_bytes
    for (i, j), row in kls.items():
        at = group_of[i], j + 1
        harm[at] += harm_of(ranked[i, j])
        size[at] += row.size_bytes
        nats[at] += sensitivities.prompt_kl(row.component, row.scheme, row.method)
        if draws is not None:
            draws[at] += sensitivities.draws(row.component, row.scheme)
    return Options(
        names=tuple(names),
        schemes=chosen,
        groups=groups,
        rank_by=rank_by,
        harm=harm,
        size=size,
        n_parameters=sum(component.n_parameters for component in components),
        nats=nats,
        draws=draws,
        lengths=lengths,
        n_below_rounding=sum(sensitivities.below_rounding(row) for row in kls.values()),
    )


def _asked_for(sensitivities: "Sensitivities", schemes: Sequence[str]) -> tuple[str, ...]:
    there = tuple(dict.fromkeys(row.scheme for row in sensitivities.rows))
    if not there:
        raise RecordError(f"{sensitivities.path} holds no finished row; run `dtm sweep` again")
    for scheme in schemes:
        if scheme not in there:
            raise RecordError(
                f"{sensitivities.path} holds nothing on the scheme {scheme!r}; it has "
                f"{', '.join(there)}: choose among them, or sweep that scheme too"
            )
    return tuple(dict.fromkeys(schemes)) or there


Rows = Mapping[tuple[str, str], Mapping[str, "Sensitivity"]]
"""(component, scheme) -> method -> row."""


def _by_pair(sensitivities: "Sensitivities") -> Rows:
    rows: dict[tuple[str, str], dict[str, Sensitivity]] = {}
    for row in sensitivities.rows:
        rows.setdefault((row.component, row.scheme), {})[row.method] = row
    return rows


def _kl_row(
    sensitivities: "Sensitivities", rows: Rows, component: str, scheme: str, method: Method
) -> "Sensitivity":
    """The row whose KL and draws stand for a component under a scheme."""
    found = rows.get((component, scheme), {})
    measured, probed = found.get("measure"), found.get("probe")
    if method is Method.probe:
        chosen = probed
    elif method is Method.measure:
        chosen = measured
    elif measured and probed:
        chosen = probed if sensitivities.below_rounding(measured) else measured
    else:
        chosen = measured or probed
    if chosen is None:
        how = "" if method is Method.auto else f" --method {method}"
        raise RecordError(
            f"{sensitivities.path} has no row for {component} under {scheme}; run `dtm sweep` "
            f"again{how}, which goes on where it was, or choose finished schemes with --scheme"
        )
    return chosen


def _other_row(
    sensitivities: "Sensitivities", rows: Rows, kl_row: "Sensitivity", rank_by: RankBy
) -> "Sensitivity":
    """The row that holds another number than a KL: the measured one, if there is one."""
    found = rows[kl_row.component, kl_row.scheme]
    row = found.get("measure", kl_row)
    if _number(row, rank_by) is None:
        wanted = {
            RankBy.ppl: "sweep with --method measure and --text FILE",
            RankBy.weight_error: "sweep a scheme that changes weights",
        }.get(rank_by, "sweep with --method measure")
        raise RecordError(
            f"{sensitivities.path}: {rank_by} of {row.component} under {row.scheme} was not "
            f"measured; {wanted}, or rank by kl"
        )
    return row


def _number(row: "Sensitivity", rank_by: RankBy) -> float | None:
    value: float | None = getattr(row, rank_by.replace("-", "_"))
    return value


def _harm_of(
    sensitivities: "Sensitivities", rank_by: RankBy, *, n_schemes: int
) -> "Callable[[Sensitivity], float]":
    """How much harm a row tells of, by the chosen order."""
    if rank_by is RankBy.fdt:
        mean_length = float(np.mean(sensitivities.lengths))
        return lambda row: mean_length - _known(row, rank_by)
    if rank_by in (RankBy.dppl, RankBy.ppl):
        own = sensitivities.run.get(f"base_{rank_by}")
        if own is None and n_schemes > 1:
            raise RecordError(
                f"{sensitivities.path} does not hold the base's own {rank_by}, against which "
                "several schemes are weighed; choose one scheme, or rank by kl"
            )
        # With one scheme only the order counts, and the base's own value shifts all alike.
        shift = math.log(own) if own is not None else 0.0
        return lambda row: math.log(_known(row, rank_by)) - shift
    return lambda row: _known(row, rank_by)


def _known(row: "Sensitivity", rank_by: RankBy) -> float:
    value = _number(row, rank_by)
    assert value is not None, "checked when the row was chosen"
    return value


def _room_for_draws(
    sensitivities: "Sensitivities", shape: tuple[int, int], rows: Sequence[Any]
) -> NDArray[np.float32] | None:
    if any(row.method != "probe" for row in rows):
        return None
    n_draws = sensitivities.draws(rows[0].component, rows[0].scheme).shape[1]
    whole = (*shape, len(sensitivities.lengths), n_draws)
    return np.zeros(whole, np.float32) if math.prod(whole) <= MAX_DRAWS else None
