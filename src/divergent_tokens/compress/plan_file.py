"""plan.json: a plan, the base that it was made for, its size, and how it came about."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from divergent_tokens.errors import RecordError, SchemeError
from divergent_tokens.store import content_key, write_text

if TYPE_CHECKING:
    from divergent_tokens.compress.plan import Plan
    from divergent_tokens.models import Model, Outline

SCHEMA = "divergent-tokens/plan/1"
_BASE_FIELDS = ("reference", "fingerprint", "model_type", "config")


@dataclass(frozen=True)
class PlanFile:
    """The content of plan.json; schemes are kept as their text, so that writing needs no torch."""

    base: Mapping[str, Any]
    """`reference`, `fingerprint`, `model_type` and `config` of the base."""
    components: Mapping[str, str]
    """Component name -> its scheme's text; what is not named stays as the base has it."""
    size_bytes: int
    """Of all components that there were to choose from, under the plan."""
    base_size_bytes: int
    """Of the same components in the base."""
    trail: Sequence[Mapping[str, Any]] = field(default=())
    """What was done, in order: each has its `step`, and what was predicted or measured then."""

    @property
    def digest(self) -> str:
        """Of components and schemes: a measurement says by it what it measured."""
        return content_key(components=dict(self.components))

    def plan(self) -> "Plan":
        """The plan itself. Raises SchemeError, naming the component, for an unknown scheme."""
        from divergent_tokens.compress.plan import Plan
        from divergent_tokens.compress.schemes import parse_scheme

        schemes = {}
        for name, text in self.components.items():
            try:
                schemes[name] = parse_scheme(text)
            except SchemeError as error:
                raise SchemeError(f"{name}: {error}") from error
        return Plan(schemes, _sources(self.trail))

    def to_json(self) -> dict[str, Any]:
        """Plain values in the form of the JSON Schema that comes with the package."""
        return {
            "schema": SCHEMA,
            "base": dict(self.base),
            "components": dict(self.components),
            "size_bytes": self.size_bytes,
            "base_size_bytes": self.base_size_bytes,
            "trail": [dict(step) for step in self.trail],
        }


def write_plan(path: Path, file: PlanFile) -> None:
    """Write plan.json, which appears whole or not at all."""
    write_text(path, json.dumps(file.to_json(), allow_nan=False, indent=1) + "\n")


def read_plan(path: Path) -> PlanFile:
    """What a plan.json holds, every scheme of it known.

    Raises RecordError for a file that is not there, is no plan, or names a component twice, and
    SchemeError for an unknown scheme; both name the file.
    """
    record = _read_json(path)
    schema = record.get("schema")
    if schema != SCHEMA:
        raise RecordError(
            f"{path} has the schema {schema!r}; expected {SCHEMA!r}, the file that `dtm search` "
            "writes"
        )
    file = PlanFile(
        base=_base(record, path),
        components=_components(record, path),
        size_bytes=_count(record, "size_bytes", path),
        base_size_bytes=_count(record, "base_size_bytes", path),
        trail=_trail(record, path),
    )
    try:
        file.plan()
    except SchemeError as error:
        raise SchemeError(f"{path}: {error}") from error
    return file


def check_base(file: PlanFile, model: "Model | Outline", name: Path | str) -> None:
    """Raise RecordError, naming the plan so, if it was made for another base."""
    if file.base["fingerprint"] != model.fingerprint:
        raise RecordError(
            f"{name} was made for {file.base['reference']} (fingerprint "
            f"{file.base['fingerprint'][:12]}…), and {model.reference} is another model "
            f"({model.fingerprint[:12]}…); take that base, or search a plan for this one"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        if data.startswith(b"SQLite format 3"):
            raise RecordError(
                f"{path} is a sweep, and no plan yet: make one with `dtm search {path} --bits 6 "
                "--out plan.json`"
            )
        text = data.decode("utf-8")
    except IsADirectoryError as error:
        raise RecordError(
            f"the plan {path} is a folder; expected a file such as {path / 'plan.json'}"
        ) from error
    except FileNotFoundError as error:
        raise RecordError(f"the plan {path} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(
            f"the plan {path} cannot be read ({error}); expected plan.json"
        ) from error

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise RecordError(
                    f"{path} names {key!r} twice, as {found[key]!r} and as {value!r}; each name "
                    "stands for one thing: leave one of them out"
                )
            found[key] = value
        return found

    try:
        record = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is no JSON ({error}); expected a plan.json") from error
    if not isinstance(record, dict):
        raise RecordError(f"{path} holds a {type(record).__name__}; expected a plan.json")
    return record


def _base(record: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    base = record.get("base")
    if not isinstance(base, dict) or any(name not in base for name in _BASE_FIELDS):
        raise _wrong(path, "base", base, f"an object with {', '.join(_BASE_FIELDS)}")
    for name in ("reference", "fingerprint"):
        if not isinstance(base[name], str):
            raise _wrong(path, f"base.{name}", base[name], "a text")
    return base


def _components(record: Mapping[str, Any], path: Path) -> Mapping[str, str]:
    components = record.get("components")
    if not isinstance(components, dict):
        raise _wrong(path, "components", components, "an object of names and schemes")
    for name, scheme in components.items():
        if not isinstance(scheme, str):
            raise _wrong(path, f"the scheme of {name}", scheme, "a text such as 'int8'")
    return components


def _count(record: Mapping[str, Any], name: str, path: Path) -> int:
    value = record.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _wrong(path, name, value, "a number of bytes")
    return value


def _trail(record: Mapping[str, Any], path: Path) -> Sequence[Mapping[str, Any]]:
    trail = record.get("trail")
    if not isinstance(trail, list):
        raise _wrong(path, "trail", trail, "a list of steps")
    for step in trail:
        if not isinstance(step, dict) or not isinstance(step.get("step"), str):
            raise _wrong(path, "trail", step, "steps with a name under 'step'")
    return tuple(trail)


def _sources(trail: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the schemes of the sweep that a plan was chosen from read, as far as the trail says."""
    found: dict[str, str] = {}
    for step in trail:
        sweep = step.get("sweep")
        sources = sweep.get("sources") if isinstance(sweep, Mapping) else None
        if isinstance(sources, Mapping):
            found.update((str(scheme), str(source)) for scheme, source in sources.items())
    return found


def _wrong(path: Path, name: str, found: object, expected: str) -> RecordError:
    shown = repr(found)
    shown = shown if len(shown) <= 80 else shown[:80] + "…"
    return RecordError(f"{path}: {name} is {shown}; expected {expected}; search the plan again")
