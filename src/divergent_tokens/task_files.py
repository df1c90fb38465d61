"""Definitions of lm-eval's tasks, found by name in its own folder, in others, or in one file."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.quiet import one_line

_ENDS = (".yaml", ".yml")


def find_tasks(names: Sequence[str], paths: Sequence[Path]) -> dict[str, Any]:
    """The harness's Tasks and Groups of these names, by name, with their documents.

    The harness's own 14,000 definitions take twenty seconds to read; they are left alone where all
    names are in `paths`. Raises DivergentTokensError for a name that nobody knows, a definition
    that cannot be read, and data that cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    include = [str(path) for path in paths]
    manager = TaskManager(include_path=include, include_defaults=False)
    if not all(_known_here(name, manager) for name in names):
        manager = TaskManager(include_path=include)
    specs = [spec for name in names for spec in _specs(name, manager, paths)]
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec in dict.fromkeys(specs):
        for kind, found in _load(spec, manager).items():
            loaded[kind].update(found)
    return loaded


def _known_here(name: str, manager: Any) -> bool:
    """Whether a name, and each member of a group, is found without the harness's own tasks."""
    entry = manager.task_index.get(name)
    if entry is None:
        return _is_file(name) and not isinstance(_read(Path(name)).get("task"), list)
    members = (entry.cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    named = [member if isinstance(member, str) else member.get("task") for member in members]
    return all(isinstance(member, str) and _known_here(member, manager) for member in named)


def _specs(name: str, manager: Any, paths: Sequence[Path]) -> list[str]:
    """The names or files that a name stands for."""
    if name in manager.task_index:
        return [name]
    if _is_file(name):
        _read(Path(name))
        return [name]
    if any(sign in name for sign in "*?[") and (found := manager.match_tasks([name])):
        return list(found)
    if name.endswith(_ENDS):
        raise DivergentTokensError(f"there is no task file {name}; check the path")
    for path in paths:  # the harness passes over what it cannot read
        for file in sorted(path.rglob("*.yaml")):
            _read(file)
    near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
    meant = f"did you mean {' or '.join(near)}?" if near else "is --task-path missing?"
    raise DivergentTokensError(
        f"lm-eval knows no task {name!r}; {meant} `lm-eval ls tasks` lists all of them"
    )


def _is_file(name: str) -> bool:
    return name.endswith(_ENDS) and Path(name).is_file()


def _read(path: Path) -> dict[str, Any]:
    """A definition without what its !function names, nor what it includes."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        found: dict[str, Any] = load_yaml(path, resolve_func=False)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DivergentTokensError(
            f"the task file {path} cannot be read ({one_line(error)}); expected YAML with a task "
            "of lm-eval"
        ) from error
    return found


def _load(spec: str, manager: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = manager.load([spec])
    except Exception as error:  # of the harness, of datasets, of the hub's client, of a !function
        raise DivergentTokensError(
            f"the task {spec} cannot be loaded ({type(error).__name__}: {one_line(error)}); check "
            f"{', '.join(_sources(spec, manager)) or 'its definition'}"
        ) from error
    if not found["tasks"]:
        raise DivergentTokensError(f"the group {spec} holds no task; expected one at least")
    return found


def _sources(spec: str, manager: Any) -> Iterator[str]:
    """Where a task's definition and data come from, for a message."""
    entry = manager.task_index.get(spec)
    path = Path(spec) if entry is None else entry.yaml_path
    if path is not None:
        yield f"its definition {path}"
        config = _read(path)
        data = [config.get("dataset_path"), config.get("dataset_name")]
        if any(data):
            yield f"its dataset {':'.join(str(part) for part in data if part)}"
        if config.get("dataset_path") not in ("json", "csv", "parquet", "text", None):
            yield "and the connection: it comes from the hub if it has not been downloaded before"
