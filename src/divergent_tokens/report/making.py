"""How the records were made: versions, seeds, commands, fingerprints."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from divergent_tokens.report.records import WRITERS, Source
from divergent_tokens.report.tables import Record, harmless


@dataclass(frozen=True)
class Making:
    """Of one record."""

    file: str
    kind: str
    facts: Sequence[tuple[str, str]]
    """Name and value, as text."""
    command: str
    """As it can be typed again; empty where the record does not hold it."""


def making(source: Source) -> Making:
    """All that a record says of its making."""
    record = source.record
    command = record.get("command") or []
    return Making(
        file=harmless(source.name),
        kind=f"{source.kind}, by {WRITERS[source.kind]}",
        facts=[(name, harmless(value)) for name, value in _facts(source)],
        command=harmless(shlex.join(map(str, command))),
    )


def _facts(source: Source) -> Iterator[tuple[str, str]]:
    record = source.record
    base = record["base"]
    yield "base", str(base["reference"])
    yield "fingerprint", str(base["fingerprint"])
    if "dtype" in base or record.get("dtype"):
        device = base.get("device") or record.get("device")
        yield "computed in", f"{base.get('dtype') or record.get('dtype')} on {device}"
    prompts = _prompts(source)
    if prompts is not None:
        yield "prompts", f"{prompts['n_prompts']} from {prompts['source']}"
        yield "prompts' digest", str(prompts["digest"])
    seed = _seed(source)
    if seed is not None:
        yield "seed", str(seed)
    versions = record.get("versions") or {}
    if versions:
        yield "versions", ", ".join(f"{name} {number}" for name, number in versions.items())


def _prompts(source: Source) -> Record | None:
    record = source.record
    found: Record | None = record.get("prompts")
    if source.kind == "verification" and record["measured"]:
        found = record["measured"]["prompts"]
    if source.kind == "curve":
        found = record["points"][0]["measured"]["prompts"]
    if source.kind == "plan":
        steps = [step for step in record["trail"] if step["step"] == "measured"]
        found = steps[-1]["prompts"] if steps else None
    return found


def _seed(source: Source) -> int | None:
    record = source.record
    if source.kind == "plan":
        return next((step["seed"] for step in record["trail"] if "seed" in step), None)
    seed: int | None = record.get("seed")
    return record["settings"]["seed"] if source.kind == "pruning" else seed
