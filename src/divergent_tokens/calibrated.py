"""Schemes and plans made ready: what depends on the base's inputs is made once, and kept."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from divergent_tokens.compress.calibration import Calibration, in_blocks, second_moments
from divergent_tokens.compress.components import Component, weight_of
from divergent_tokens.compress.kept import Kept, Made, Seen
from divergent_tokens.compress.plan import Plan, check_sources
from divergent_tokens.compress.schemes import Scheme
from divergent_tokens.errors import ModelError, PromptError
from divergent_tokens.measure.documents import read_documents
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.sequences import Sequences
from divergent_tokens.models import Model
from divergent_tokens.offload import at_hand, is_offloaded
from divergent_tokens.saliencies import find_saliencies
from divergent_tokens.store import default_cache

N_TEXTS, MOST_TOKENS = 128, 512
_LENGTH = 256
"""Tokens of the sequences that Fisher saliencies are seen on."""
_SALIENCY_BYTES = 12
"""Of a weight while saliencies are found: itself, its squares and what comes of them."""


def read_calibration(source: str, base: Model) -> Calibration:
    """The first documents of a source, each up to so many tokens.

    Raises PromptError for a source that is not there or holds no text.
    """
    if source == "self":
        raise PromptError(
            "what the base draws itself is not calibrated on; expected --calibration builtin, a "
            "file that ends in .txt, .jsonl or .parquet, or hf:DATASET"
        )
    rows = []
    for document in read_documents(source):
        ids = base.tokenizer(document.text, verbose=False)["input_ids"][:MOST_TOKENS]
        if ids:
            rows.append(tuple(ids))
        if len(rows) == N_TEXTS:
            break
    if not rows:
        raise PromptError(f"{source} holds no text to calibrate on; name another source")
    return Calibration(tuple(rows), source)


def ready_schemes(
    base: Model,
    components: Sequence[Component],
    schemes: Sequence[Scheme],
    *,
    source: str = "builtin",
    cache: Path | None = None,
    progress: Progress = silent,
) -> tuple[Scheme, ...]:
    """The schemes, with what they need and lack made for each of the components."""
    if all(scheme.is_ready for scheme in schemes):
        return tuple(schemes)
    pairs = [(component, scheme) for scheme in schemes for component in components]
    calibration, kept = _opened(base, source, cache)
    _make(base, pairs, calibration, kept, progress)
    return tuple(scheme.bound(kept) for scheme in schemes)


def ready_plan(
    base: Model,
    components: Sequence[Component],
    plan: Plan,
    *,
    source: str = "builtin",
    cache: Path | None = None,
    progress: Progress = silent,
) -> Plan:
    """The plan, with what its schemes need and lack made for its components.

    Raises SchemeError for another calibration than the one that the plan was chosen with.
    """
    found = ready_plans(base, components, {"": plan}, source=source, cache=cache, progress=progress)
    return found[""]


def ready_plans(
    base: Model,
    components: Sequence[Component],
    plans: Mapping[str, Plan],
    *,
    source: str = "builtin",
    cache: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Plan]:
    """As `ready_plan`, of several plans: the base reads the text once for all of them."""
    named = {component.name: component for component in components}
    pairs = {
        name: [(named[n], scheme) for n, scheme in plan.schemes.items() if n in named]
        for name, plan in plans.items()
    }
    lacking = [name for name in plans if not all(s.is_ready for _, s in pairs[name])]
    if not lacking:
        return dict(plans)
    calibration, kept = _opened(base, source, cache)
    bound = {name: plans[name].bound(kept) for name in lacking}
    for plan in bound.values():
        check_sources(plan)
    _make(base, [pair for name in lacking for pair in pairs[name]], calibration, kept, progress)
    return {**plans, **bound}


def _opened(base: Model, source: str, cache: Path | None) -> tuple[Calibration, Kept]:
    """What is calibrated on, and where what is made of it lies or will lie."""
    calibration = read_calibration(source, base)
    return calibration, Kept(cache or default_cache(), base.fingerprint, calibration.digest)


def _make(
    base: Model,
    pairs: Sequence[tuple[Component, Scheme]],
    calibration: Calibration,
    kept: Kept,
    progress: Progress,
) -> None:
    """Make what the pairs need; what was made before is not made again."""
    wanted: dict[Seen, dict[Component, dict[str, Made]]] = {"moments": {}, "fisher": {}}
    for component, scheme in pairs:
        for step in scheme.made:
            step.check((component,))
            if not kept.has(str(step), component):
                wanted[step.made_from].setdefault(component, {})[str(step)] = step
    for steps in (*wanted["moments"].values(), *wanted["fisher"].values()):
        for step in steps.values():
            step.check_installed()
    _check_at_hand(base, tuple(wanted["moments"]))
    looks = {
        "moments": second_moments(base.network, tuple(wanted["moments"]), calibration),
        "fisher": _saliencies(base, tuple(wanted["fisher"]), calibration, progress),
    }
    for seen_as, by_component in wanted.items():
        for done, (component, seen) in enumerate(looks[seen_as]):
            owner = base.network.get_submodule(component.parameter.rpartition(".")[0])
            with at_hand(owner):
                weight = weight_of(base.network, component)
                for text, step in by_component[component].items():
                    kept.write(text, component, step.make(weight, seen))
            progress("calibrate", done + 1, len(by_component), "components")


def _check_at_hand(base: Model, components: Sequence[Component]) -> None:
    """Raise ModelError for fused experts of layers that wait elsewhere: nothing opens those."""
    stacked = [c.name for c in components if c.stack_index is not None]
    if stacked and is_offloaded(base.network):
        raise ModelError(
            f"{stacked[0]} is an expert of a fused stack, and layers of {base.reference} wait "
            f"outside {base.device}, where its inputs are not collected; exclude it, or load the "
            "model whole: another --device, or a smaller model"
        )


def _saliencies(
    base: Model, components: Sequence[Component], calibration: Calibration, progress: Progress
) -> Iterator[tuple[Component, Tensor]]:
    """Each component with its Fisher saliencies [out, in], as many at once as there is room for."""
    if not components:
        return
    sequences = joined(calibration, base)
    for block in in_blocks(components, lambda c: _SALIENCY_BYTES * c.n_parameters):
        found = find_saliencies(base, block, "fisher", sequences, progress=progress)
        yield from zip(block, found.values, strict=True)


def joined(calibration: Calibration, base: Model) -> Sequences:
    """The texts one after the other, an end of sequence between them, cut to equal length.

    Raises PromptError for less than two tokens, which teach no gradient.
    """
    ids = [i for row in calibration.rows for i in (*row, *base.eos_ids[:1])]
    length = min(_LENGTH, len(ids))
    if length < 2:
        raise PromptError(
            f"{calibration.source} holds {len(ids)} tokens, and fisher: needs two at least; name "
            "another --calibration"
        )
    n = len(ids) // length
    return Sequences(np.array(ids[: n * length], np.int64).reshape(n, length), calibration.source)
