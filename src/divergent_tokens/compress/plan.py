"""Which scheme each component gets."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from divergent_tokens.compress.components import Component
from divergent_tokens.compress.kept import Kept
from divergent_tokens.compress.schemes import Scheme
from divergent_tokens.errors import SchemeError


@dataclass(frozen=True)
class Plan:
    """Component name -> scheme; what is not named stays as the base has it."""

    schemes: Mapping[str, Scheme]
    sources: Mapping[str, str] = field(default_factory=dict)
    """What a scheme (its text) read besides the base when the plan was chosen: its `source`."""

    @property
    def name(self) -> str:
        """The scheme's text where all have the same, else a count of each, most frequent first."""
        texts = [str(scheme) for scheme in self.schemes.values()]
        distinct = sorted(set(texts), key=lambda text: (-texts.count(text), text))
        if len(distinct) == 1:
            return distinct[0]
        return ", ".join(f"{texts.count(text)} x {text}" for text in distinct) or "unchanged"

    def bound(self, kept: Kept) -> "Plan":
        """The same plan, what its schemes need made at hand."""
        return replace(self, schemes={n: s.bound(kept) for n, s in self.schemes.items()})

    @property
    def digest(self) -> str:
        """SHA-256 in hex of all names, schemes and what these read, in the order of the names."""
        lines = sorted(
            "\t".join(filter(None, (name, str(scheme), scheme.source))) + "\n"
            for name, scheme in self.schemes.items()
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def uniform_plan(components: Iterable[Component], scheme: Scheme) -> Plan:
    """The same scheme for all of them."""
    return Plan({component.name: scheme for component in components})


def check_plan(plan: Plan, components: Sequence[Component]) -> tuple[Component, ...]:
    """The components that the plan changes, in the order given.

    Raises SchemeError for a name that is not among `components`, for a scheme that does not fit
    its component, and for one that reads something else now than when the plan was chosen.
    """
    by_name = {component.name: component for component in components}
    unknown = [name for name in plan.schemes if name not in by_name]
    if unknown:
        raise SchemeError(
            f"the plan names {unknown[0]!r} ({len(unknown)} of {len(plan.schemes)} names), which "
            "is no component of this model; make the plan from this model's components"
        )
    groups: dict[Scheme, list[Component]] = {}
    for name, scheme in plan.schemes.items():
        groups.setdefault(scheme, []).append(by_name[name])
    for scheme, members in groups.items():
        scheme.check(members)
    check_sources(plan)
    return tuple(component for component in components if component.name in plan.schemes)


def check_sources(plan: Plan) -> None:
    """Raise SchemeError if a scheme reads something else now than when the plan was chosen.

    What would come out is not what was measured then. What is not at hand yet reads nothing.
    """
    for text, chosen in plan.sources.items():
        scheme = next((s for s in plan.schemes.values() if str(s) == text), None)
        now = None if scheme is None else scheme.source
        if scheme is None or now is None or now == chosen:
            continue
        what = "--calibration" if scheme.is_calibrated else "the files of its donor"
        raise SchemeError(
            f"{text} is made from other data now ({now[:12]}…) than when the plan was "
            f"chosen ({chosen[:12]}…), so what was measured does not hold; give {what} as they "
            "were for dtm sweep, or sweep and search again"
        )


def size_bytes(plan: Plan, components: Iterable[Component]) -> int:
    """Bytes of all the components under the plan; those it does not name count as in the base."""
    return sum(
        plan.schemes[component.name].size_bytes(component)
        if component.name in plan.schemes
        else component.base_size_bytes
        for component in components
    )
