"""The records that a page is made from: files of the other commands, of any kind, of one base."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from divergent_tokens.errors import RecordError
from divergent_tokens.report.tables import Record

Kind = Literal["comparison", "sweep", "plan", "curve", "pruning", "verification"]
WRITERS: Mapping[Kind, str] = {
    "comparison": "dtm compare",
    "sweep": "dtm sweep",
    "plan": "dtm search",
    "curve": "dtm search --curve",
    "pruning": "dtm prune",
    "verification": "dtm verify",
}
VERSION = 1
"""Of every kind of record that this version reads."""
IN_FOLDERS = ("pruning.json", "plan.json", "verification.json")
"""What a folder that was written stands for: the records of its own in it."""
_LATER = ("completions", "decoding")
"""Of a comparison's prompts: older files lack them, and the page does without."""
_PREFIX = "divergent-tokens/"
_SQLITE = b"SQLite format 3\0"


@dataclass(frozen=True)
class Source:
    """One record, and the file that it lay in."""

    path: Path
    kind: Kind
    record: Record
    noise: Record = field(default_factory=dict)
    """Of a comparison: what the flip law says of it (noise.py)."""
    n_parts: int = 2
    """Of the path, from its end, that tell it from the other sources'."""

    @property
    def name(self) -> str:
        """The file's name with as many folders as tell two of one name apart."""
        return "/".join(self.path.parts[-self.n_parts :])


def read_sources(paths: Sequence[Path]) -> tuple[Source, ...]:
    """The records in files and folders, in the order given.

    Raises RecordError for a file that is none of ours, of a newer version, or without anything to
    show, and for records of two bases: a page puts all numbers beside each other, and those of two
    bases are not to be compared.
    """
    files = list(dict.fromkeys(file for path in paths for file in _files(path)))
    sources = tuple(map(read_source, files))
    first = sources[0]
    for other in sources[1:]:
        if _fingerprint(other) != _fingerprint(first):
            raise RecordError(
                f"{first.path} is about {_base(first)} and {other.path} about {_base(other)}; a "
                "page is about one base, since numbers of two are not to be compared: make one "
                "for each"
            )
    return _told_apart(sources)


def _told_apart(sources: Sequence[Source]) -> tuple[Source, ...]:
    most = max(len(source.path.parts) for source in sources)
    for n in range(2, most + 1):
        named = [replace(source, n_parts=n) for source in sources]
        if len({source.name for source in named}) == len(named):
            break
    return tuple(named if most >= 2 else sources)


def read_source(path: Path) -> Source:
    """The record in a file, checked against the schema of its kind."""
    if _head(path) == _SQLITE:
        return _sweep(path)
    record = _json(path)
    kind = _kind(record, path)
    _check(record, kind, path)
    if kind == "comparison":
        from divergent_tokens.noise import noise

        _check_lengths(record, path)
        return Source(path, kind, record, noise=noise(record))
    return Source(path, kind, record)


def _files(path: Path) -> Sequence[Path]:
    if not path.is_dir():
        return [path]
    found = [path / name for name in IN_FOLDERS if (path / name).is_file()]
    if not found:
        raise RecordError(
            f"the folder {path} holds no {', '.join(IN_FOLDERS[:-1])} or {IN_FOLDERS[-1]}; name a "
            "file that dtm wrote, or such a folder"
        )
    # A plan beside a pruning is for what was written, which is another base than what was pruned.
    pruned = found[0].name == "pruning.json"
    return [file for file in found if not (pruned and file.name == "plan.json")]


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(_SQLITE))
    except FileNotFoundError as error:
        raise RecordError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise RecordError(f"{path} could not be read: {error.strerror or error}") from error


def _sweep(path: Path) -> Source:
    from divergent_tokens.search.overview import overview
    from divergent_tokens.sensitivities import read_sensitivities

    return Source(path, "sweep", overview(read_sensitivities(path)))


def _json(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} is no JSON ({error}); expected {_expected()}") from error
    if not isinstance(record, dict):
        raise RecordError(f"{path} holds a {type(record).__name__}; expected {_expected()}")
    return record


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is no JSON")


def _expected() -> str:
    return f"a file that one of {', '.join(WRITERS.values())} wrote"


def _kind(record: Record, path: Path) -> Kind:
    schema = record.get("schema")
    words = schema.removeprefix(_PREFIX).split("/") if isinstance(schema, str) else []
    for kind in WRITERS:
        if not isinstance(schema, str) or not schema.startswith(f"{_PREFIX}{kind}/"):
            continue
        if words[1:] == [str(VERSION)]:
            return kind
        raise RecordError(
            f"{path} has the schema {schema!r}; this version of dtm reads "
            f"'{_PREFIX}{kind}/{VERSION}': update divergent-tokens, or write the file again"
        )
    raise RecordError(f"{path} has the schema {schema!r}; expected {_expected()}")


def _check(record: Record, kind: Kind, path: Path) -> None:
    """Raise for what is not as the schema of its kind says."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    file = resources.files("divergent_tokens") / "data" / "schemas" / f"{kind}-{VERSION}.json"
    schema: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if kind == "comparison":
        asked = schema["properties"]["prompts"]
        asked["required"] = [name for name in asked["required"] if name not in _LATER]
    if kind == "comparison" and record.get("candidates") == []:
        raise RecordError(f"{path} holds no candidate, so there is nothing to show; compare again")
    if kind == "curve" and not record.get("points"):
        raise RecordError(f"{path} holds no point, so there is nothing to show; search again")
    error = best_match(Draft202012Validator(schema).iter_errors(record))
    if error is not None:
        message = error.message if len(error.message) <= 120 else f"{error.message[:120]}…"
        raise RecordError(
            f"{path} is no whole {kind}: {error.json_path}: {message}; expected what "
            f"`{WRITERS[kind]}` writes"
        )


def _check_lengths(record: Record, path: Path) -> None:
    """Raise for a comparison whose parts are of other numbers of prompts, or of other groups."""
    prompts, floor = record["prompts"], record["noise_floor"]
    n = prompts["n_prompts"]
    lists = {name: prompts[name] for name in ("texts", "margins", "completions") if name in prompts}
    lists |= {f"rows of {c['name']}": c["rows"] for c in record["candidates"]}
    for name, values in lists.items():
        if len(values) != n:
            raise RecordError(
                f"{path} has {n} prompts and {len(values)} {name}; expected as many: compare again"
            )
    for candidate in record["candidates"]:
        for key in ("by_domain", "by_language"):
            if candidate["metrics"][key].keys() != floor[key].keys():
                raise RecordError(
                    f"{path}: {candidate['name']} has other groups in {key} than the noise floor; "
                    "compare again"
                )


def _fingerprint(source: Source) -> str:
    return str(source.record["base"]["fingerprint"])


def _base(source: Source) -> str:
    return f"{source.record['base']['reference']} ({_fingerprint(source)[:12]}…)"
