"""Schemes and plans made ready: codes that depend on the base's inputs are made once, and kept."""

from collections.abc import Sequence
from pathlib import Path

from divergent_tokens.compress.calibration import Calibration, second_moments
from divergent_tokens.compress.components import Component, weight_of
from divergent_tokens.compress.gptq import Codes, Gptq, check_installed, round_by_gptq
from divergent_tokens.compress.plan import Plan, check_sources
from divergent_tokens.compress.schemes import Scheme
from divergent_tokens.errors import PromptError
from divergent_tokens.measure.documents import read_documents
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.models import Model
from divergent_tokens.offload import at_hand
from divergent_tokens.store import default_cache

N_TEXTS, MOST_TOKENS = 128, 512


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
    """The schemes, with codes for each of the components where they need and lack them."""
    if not any(scheme.lacks_codes for scheme in schemes):
        return tuple(schemes)
    pairs = [(component, scheme) for scheme in schemes for component in components]
    calibration, codes = _opened(base, source, cache)
    _make(base, pairs, calibration, codes, progress)
    return tuple(scheme.bound(codes) for scheme in schemes)


def ready_plan(
    base: Model,
    components: Sequence[Component],
    plan: Plan,
    *,
    source: str = "builtin",
    cache: Path | None = None,
    progress: Progress = silent,
) -> Plan:
    """The plan, with codes for its components where their schemes need and lack them.

    Raises SchemeError for another calibration than the one that the plan was chosen with.
    """
    named = {component.name: component for component in components}
    pairs = [(named[n], scheme) for n, scheme in plan.schemes.items() if n in named]
    if not any(scheme.lacks_codes for _, scheme in pairs):
        return plan
    calibration, codes = _opened(base, source, cache)
    bound = plan.bound(codes)
    check_sources(bound)
    _make(base, pairs, calibration, codes, progress)
    return bound


def _opened(base: Model, source: str, cache: Path | None) -> tuple[Calibration, Codes]:
    """What is calibrated on, and where its codes lie or will lie."""
    calibration = read_calibration(source, base)
    return calibration, Codes(cache or default_cache(), base.fingerprint, calibration.digest)


def _make(
    base: Model,
    pairs: Sequence[tuple[Component, Scheme]],
    calibration: Calibration,
    codes: Codes,
    progress: Progress,
) -> None:
    """Make the codes that the pairs need; what was made before is not made again."""
    wanted: dict[Component, list[Gptq]] = {}
    for component, scheme in pairs:
        for step in scheme.steps:
            if isinstance(step, Gptq):
                step.check([component])
                if not codes.has(str(step), component):
                    wanted.setdefault(component, []).append(step)
    if wanted:
        check_installed()
    found = second_moments(base.network, tuple(wanted), calibration)
    for done, (component, moment) in enumerate(found):
        owner = base.network.get_submodule(component.parameter.rpartition(".")[0])
        with at_hand(owner):
            weight = weight_of(base.network, component)
            for step in wanted[component]:
                codes.write(str(step), component, round_by_gptq(weight, moment, step.grid))
        progress("gptq", done + 1, len(wanted), "components")
