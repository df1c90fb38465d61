"""How much harm each component does under each scheme: a SQLite file that survives a kill.

Whoever fills it adds a row, with the arrays that belong to it, in one transaction; the first one
makes the tables and all that the rows rest on. So at any moment the file is empty, or whole.
"""

import io
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from divergent_tokens.errors import RecordError

SCHEMA = "divergent-tokens/sweep/1"
ROUNDING_FACTOR = 3
"""A measured KL under so many times the rounding floor cannot be told from rounding."""

Method = Literal["probe", "measure"]
Pair = tuple[str, str]
"""The name of a component and the text of a scheme."""

_MAGIC = b"SQLite format 3\0"
_APPLICATION_ID = int.from_bytes(b"dtm1", "big")
"""In the header of every file of ours, so that nobody else's is ever opened for writing."""
_PATIENCE_SECONDS = 60.0
"""How long to wait for another process that is just writing."""

_TABLES = (
    "component (name TEXT PRIMARY KEY, kind TEXT NOT NULL, layer INTEGER, "
    "out_features INTEGER NOT NULL, in_features INTEGER NOT NULL, n_parameters INTEGER NOT NULL, "
    "base_size_bytes INTEGER NOT NULL)",
    "sensitivity (component TEXT NOT NULL REFERENCES component (name), scheme TEXT NOT NULL, "
    "method TEXT NOT NULL, kl REAL NOT NULL, kl_se REAL, fdt REAL, sdt REAL, dppl REAL, "
    "acceptance REAL, ppl REAL, weight_error REAL, n_prompts INTEGER NOT NULL, "
    "size_bytes INTEGER NOT NULL, seconds REAL NOT NULL, PRIMARY KEY (component, scheme, method))",
    "draws (component TEXT NOT NULL, scheme TEXT NOT NULL, array BLOB NOT NULL, "
    "PRIMARY KEY (component, scheme))",
    "prompt_kl (component TEXT NOT NULL, scheme TEXT NOT NULL, method TEXT NOT NULL, "
    "array BLOB NOT NULL, PRIMARY KEY (component, scheme, method))",
    "margins (prompt INTEGER PRIMARY KEY, array BLOB NOT NULL)",
    "prompt (idx INTEGER PRIMARY KEY, digest TEXT NOT NULL, domain TEXT, language TEXT)",
    "run (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
)

_FREE = {
    "command",
    "batch_size",
    "compiled",
    "rounding_kl",
    "base_dppl",
    "base_ppl",
    "passes",
    "settled",
}
"""Run keys that may differ: found out on the way, or of no effect on the rows."""
_FREE_PARTS = {"base.reference", "base.config", "prompts.source"}
"""Parts that may differ as long as the fingerprint and the digest beside them do not."""
_BY_SCHEME = "sources"
"""Run key with a digest of what each scheme reads besides the base; further schemes add theirs."""
_KEYS_OF = {"n_draws": "probe", "text": "measure"}
"""Run keys that count for the rows of one method only."""


@dataclass(frozen=True)
class ComponentRow:
    """A weight matrix of the base; see compress/components.py."""

    name: str
    kind: str
    layer: int | None
    """None for embeddings and the head."""
    out_features: int
    in_features: int
    n_parameters: int
    base_size_bytes: int


@dataclass(frozen=True)
class PromptRow:
    """One prompt; its margins have its place in the list."""

    idx: int
    digest: str
    domain: str | None
    language: str | None


@dataclass(frozen=True)
class Sensitivity:
    """What one scheme does to one component, found by one method; None is not known."""

    component: str
    scheme: str
    method: Method
    kl: float
    """Nats per token, over all prompts."""
    kl_se: float | None
    """Standard error of a ratio over prompts; None for a single prompt."""
    fdt: float | None
    sdt: float | None
    dppl: float | None
    acceptance: float | None
    ppl: float | None
    """Conventional, of the run's text."""
    weight_error: float | None
    """‖W′ − W‖ / ‖W‖, Frobenius; None for a matrix of zeros."""
    n_prompts: int
    size_bytes: int
    """Of the component under the scheme."""
    seconds: float
    """The row's share of the computing time."""


@dataclass(frozen=True)
class Sensitivities:
    """All that a file held when it was read; arrays are read when they are first asked for."""

    path: Path
    run: Mapping[str, Any]
    """Everything that makes two runs the same, and what was found out of the base on the way."""
    components: tuple[ComponentRow, ...]
    rows: tuple[Sensitivity, ...]
    """In the order in which they were finished."""
    prompts: tuple[PromptRow, ...]
    margins: tuple[NDArray[np.float32], ...]
    """The base's, [token] of each prompt."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """L of each completion. [prompt]"""
        return np.array([len(row) for row in self.margins], np.int64)

    @property
    def rounding_kl(self) -> float | None:
        """KL of the rounding floor in nats per token; None until something was measured."""
        found: float | None = self.run.get("rounding_kl")
        return found

    def below_rounding(self, row: Sensitivity) -> bool:
        """Whether a measured KL is too small to be told from rounding."""
        floor = self.rounding_kl
        return row.method == "measure" and floor is not None and row.kl < ROUNDING_FACTOR * floor

    def draws(self, component: str, scheme: str) -> NDArray[np.float32]:
        """The probe's s. [prompt, draw]"""
        return self._array("draws", component, scheme)

    def prompt_kl(
        self, component: str, scheme: str, method: str = "measure"
    ) -> NDArray[np.float64]:
        """KL in nats summed over each completion; the probe's is ½ s², averaged over draws."""
        if method == "probe":
            s = self.draws(component, scheme).astype(np.float64)
            return np.asarray(0.5 * np.square(s).mean(-1))
        return self._array("prompt_kl", component, scheme, method)

    def _array(self, table: str, *key: str) -> NDArray[Any]:
        blobs: Mapping[tuple[str, ...], bytes] = getattr(self, f"_all_{table}")
        if key not in blobs:
            raise RecordError(
                f"{self.path} holds no {table} of {key[0]} under {key[1]}; run `dtm sweep` again"
            )
        return _array_of(blobs[key], self.path)

    @cached_property
    def _all_draws(self) -> Mapping[tuple[str, ...], bytes]:
        return self._blobs("SELECT component, scheme, array FROM draws")

    @cached_property
    def _all_prompt_kl(self) -> Mapping[tuple[str, ...], bytes]:
        return self._blobs("SELECT component, scheme, method, array FROM prompt_kl")

    def _blobs(self, query: str) -> Mapping[tuple[str, ...], bytes]:
        with _reading(self.path) as connection:
            return {tuple(key): blob for *key, blob in connection.execute(query)}


def read_sensitivities(path: Path | str) -> Sensitivities:
    """All that the file holds now; it may be written to meanwhile.

    Raises RecordError for a file that is not there, another program's, empty or damaged.
    """
    path = Path(path)
    with _reading(path) as connection:
        run = _read_run(connection, path)
        return Sensitivities(
            path=path,
            run=run,
            components=tuple(
                ComponentRow(*row) for row in _rows(connection, "component", ComponentRow)
            ),
            rows=tuple(Sensitivity(*row) for row in _rows(connection, "sensitivity", Sensitivity)),
            prompts=tuple(PromptRow(*row) for row in _rows(connection, "prompt", PromptRow)),
            margins=tuple(
                _array_of(blob, path)
                for (blob,) in connection.execute("SELECT array FROM margins ORDER BY prompt")
            ),
        )


def resumed_run(path: Path | str, run: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the file says of its run, if it can go on with this one; None if there is nothing yet.

    `run` may hold only some of the keys: those that are known before the expensive work begins.
    Raises RecordError, leaving the file as it is, for a file that is not ours and for a run that
    differs in what rows depend on: it says in what.
    """
    path = Path(path)
    if not _is_ours(path):
        return None
    with _clear_errors(path), closing(_connect(path, "rw")) as connection:
        if not _n_tables(connection):  # stopped while it was made, and rolled back
            return None
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise RecordError(f"{path} is damaged ({verdict}); {_DAMAGED}")
        kept = _read_run(connection, path)
        _check_same(path, kept, run, _methods(connection))
        return kept


@contextmanager
def open_sensitivities(
    path: Path | str,
    run: Mapping[str, Any],
    components: Sequence[ComponentRow],
    prompts: Sequence[PromptRow],
    margins: Sequence[ArrayLike],
) -> "Iterator[SensitivityWriter]":
    """A writer to a new file, or to one of the same run, which keeps what it has.

    Components that the file does not know yet are added to it. Raises as `resumed_run`.
    """
    path = Path(path)
    resumed_run(path, run)
    with closing(_opened(path)) as connection:
        with _transaction(path, connection):
            if _n_tables(connection):  # asked again: another process may just have made them
                kept = _read_run(connection, path)
                _check_same(path, kept, run, _methods(connection))
                if _BY_SCHEME in run:
                    _set(connection, {_BY_SCHEME: kept.get(_BY_SCHEME, {}) | run[_BY_SCHEME]})
            else:
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                for table in _TABLES:
                    connection.execute(f"CREATE TABLE {table}")
                _insert(connection, "prompt", prompts)
                connection.executemany(
                    "INSERT INTO margins VALUES (?, ?)",
                    [(i, _blob(np.asarray(row, np.float32))) for i, row in enumerate(margins)],
                )
                _set(connection, {"schema": SCHEMA, **run})
            methods = _methods(connection)
            # What counts for one method's rows is free until there is one.
            late = {key: run[key] for key, method in _KEYS_OF.items() if key in run}
            _set(connection, {k: v for k, v in late.items() if _KEYS_OF[k] not in methods})
            _insert(connection, "component", components)
        yield SensitivityWriter(path, connection)


def keep(path: Path | str, **values: Any) -> None:
    """Keep values of a file's run that became known on the way."""
    path = Path(path)
    with closing(_opened(path)) as connection:
        SensitivityWriter(path, connection).set(**values)


class SensitivityWriter:
    """Adds rows to a file, each in a transaction of its own."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """To a file that is open; see `open_sensitivities`."""
        self.path = path
        self._connection = connection

    @property
    def run(self) -> Mapping[str, Any]:
        """The run's keys as the file has them now."""
        with _clear_errors(self.path):
            return _read_run(self._connection, self.path)

    def done(self, method: Method) -> set[tuple[str, str]]:
        """Which (component, scheme) have their row."""
        query = "SELECT component, scheme FROM sensitivity WHERE method = ?"
        with _clear_errors(self.path):
            return set(self._connection.execute(query, (method,)))

    def add(
        self,
        row: Sensitivity,
        *,
        draws: ArrayLike | None = None,
        prompt_kl: ArrayLike | None = None,
    ) -> None:
        """Keep a row and its arrays, s [prompt, draw] and nats [prompt], all or nothing.

        A row that is there already stays: another process was quicker, and its row is as good.
        """
        with _transaction(self.path, self._connection):
            self._add(row, draws, prompt_kl)

    def add_all(self, rows: Sequence[tuple[Sensitivity, ArrayLike | None]]) -> None:
        """Keep rows with their draws, all of them or none."""
        with _transaction(self.path, self._connection):
            for row, draws in rows:
                self._add(row, draws, None)

    def set(self, **values: Any) -> None:
        """Keep values of the run that became known on the way."""
        unknown = values.keys() - _FREE
        assert not unknown, f"{unknown} decide about resuming and are set when the file is made"
        with _transaction(self.path, self._connection):
            _set(self._connection, values)

    def _add(self, row: Sensitivity, draws: ArrayLike | None, prompt_kl: ArrayLike | None) -> None:
        if not _insert(self._connection, "sensitivity", [row]):
            return
        if draws is not None:
            self._connection.execute(
                "INSERT INTO draws VALUES (?, ?, ?)",
                (row.component, row.scheme, _blob(np.asarray(draws, np.float32))),
            )
        if prompt_kl is not None:
            self._connection.execute(
                "INSERT INTO prompt_kl VALUES (?, ?, ?, ?)",
                (row.component, row.scheme, row.method, _blob(np.asarray(prompt_kl, np.float64))),
            )


# --- what makes two runs the same ---


def _check_same(
    path: Path, kept: Mapping[str, Any], run: Mapping[str, Any], methods: set[str]
) -> None:
    there, now = _leaves(kept), _leaves(json.loads(json.dumps(run)))
    different = [
        name
        for name in now
        if _KEYS_OF.get(name) in {None, *methods}
        and name.partition(".")[0] not in _FREE
        and (name in there or name.partition(".")[0] != _BY_SCHEME)
        and now[name] != there.get(name)
    ]
    if all(name in _FREE_PARTS for name in different):
        return
    shown = [
        f"{name} is {_short(there.get(name))} in the file and {_short(now[name])} now"
        for name in different
        if name != "base.config"
    ]
    raise RecordError(
        f"{path} holds a sweep that cannot go on with this one: {'; '.join(shown[:4])}. Give the "
        "same settings again, or another --out"
    )


def _leaves(run: Mapping[str, Any]) -> dict[str, Any]:
    """Keys, and `key.part` where a value has parts; a config counts as one."""
    found: dict[str, Any] = {}
    for key, value in run.items():
        parts = value.items() if isinstance(value, dict) else ()
        found.update({f"{key}.{part}": inner for part, inner in parts} or {key: value})
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}...{text[-1:]}"


def _methods(connection: sqlite3.Connection) -> set[str]:
    return {method for (method,) in connection.execute("SELECT DISTINCT method FROM sensitivity")}


# --- SQLite ---

_DAMAGED = "it was left as it is; name another file, or delete it to begin anew"


def _is_ours(path: Path) -> bool:
    """Whether there is something in the file; RecordError if it is another program's."""
    if path.exists() and not path.is_file():
        raise RecordError(f"{path} is a folder or a device; name a file")
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RecordError(f"{path} could not be read: {error.strerror or error}") from error
    if not head:
        return False
    if not head.startswith(_MAGIC):
        what = "no SQLite file"
    elif int.from_bytes(head[68:72], "big") != _APPLICATION_ID:
        what = "a SQLite file of another program"
    else:
        return True
    raise RecordError(
        f"{path} is {what}; expected one that `dtm sweep` wrote. It was left as it is; check the "
        "path"
    )


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees one moment of the file."""
    if not path.exists():
        raise RecordError(f"{path} does not exist; check the path, or run `dtm sweep` first")
    if not _is_ours(path):
        raise RecordError(f"{path} is empty: its sweep was stopped at the start; run it again")
    # Only who may write can roll back what a killed process left half done.
    writable = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    with _clear_errors(path), closing(_connect(path, "rw" if writable else "ro")) as connection:
        connection.execute("BEGIN")
        yield connection


def _opened(path: Path) -> sqlite3.Connection:
    with _clear_errors(path):
        return _connect(path, "rwc")


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=_PATIENCE_SECONDS, isolation_level=None)


@contextmanager
def _transaction(path: Path, connection: sqlite3.Connection) -> Iterator[None]:
    """All of it, or nothing where anything goes wrong, an interrupt included."""
    with _clear_errors(path):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite says into a message that names the file and says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            what = f"could not write {path}: {error}; every finished row is safe in it. Free some "
            what += "room and run the same again"
        elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            what = f"{path} is being written to by another process; wait for it, or stop it"
        elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            what = f"{path} cannot be written to: {error}; check its folder and permissions"
        else:
            what = f"{path} is damaged, or no sweep of this version ({error}); {_DAMAGED}"
        raise RecordError(what) from error


def _n_tables(connection: sqlite3.Connection) -> int:
    (n_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return int(n_tables)


def _read_run(connection: sqlite3.Connection, path: Path) -> dict[str, Any]:
    try:
        run = {k: json.loads(v) for k, v in connection.execute("SELECT key, value FROM run")}
    except (ValueError, TypeError) as error:
        raise RecordError(f"{path} is damaged (its run: {error}); {_DAMAGED}") from error
    if run.get("schema") != SCHEMA:
        raise RecordError(
            f"{path} has the schema {run.get('schema')!r}; this version of dtm reads {SCHEMA!r}. "
            "Name another file"
        )
    return run


def _set(connection: sqlite3.Connection, values: Mapping[str, Any]) -> None:
    connection.executemany(
        "INSERT OR REPLACE INTO run VALUES (?, ?)",
        [(key, json.dumps(value, allow_nan=False)) for key, value in values.items()],
    )


def _rows(connection: sqlite3.Connection, table: str, kind: type) -> Iterator[Any]:
    columns = ", ".join(field.name for field in fields(kind))
    return connection.execute(f"SELECT {columns} FROM {table} ORDER BY rowid")


def _insert(connection: sqlite3.Connection, table: str, rows: Sequence[Any]) -> int:
    """Rows of a dataclass whose fields are the table's columns; how many were not there yet."""
    if not rows:
        return 0
    columns = ", ".join(field.name for field in fields(rows[0]))
    marks = ", ".join("?" * len(fields(rows[0])))
    return connection.executemany(
        f"INSERT INTO {table} ({columns}) VALUES ({marks}) ON CONFLICT DO NOTHING",
        [tuple(map(_plain, astuple(row))) for row in rows],
    ).rowcount


def _plain(value: Any) -> Any:
    """What SQLite takes: Python's own numbers, and nothing where a number is not one."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _blob(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _array_of(blob: bytes, path: Path) -> NDArray[Any]:
    """The array of an npy file's bytes, read only; thousands of them have the same header."""
    try:
        end = 10 + int.from_bytes(blob[8:10], "little")
        shape, dtype = _layout(blob[:end])
        return np.frombuffer(blob, dtype, offset=end).reshape(shape)
    except (ValueError, TypeError) as error:
        raise RecordError(f"{path} is damaged (an array: {error}); {_DAMAGED}") from error


@lru_cache(maxsize=64)
def _layout(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("no npy file of version 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran_order or dtype.hasobject:
        raise ValueError("expected plain numbers, row by row")
    return shape, dtype
