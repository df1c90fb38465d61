"""Documents, wherever they lie: written for this project, in files, or in a dataset."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from divergent_tokens.errors import PromptError

HF_SPLITS = ("validation", "test", "train")
"""Which split of a dataset is taken when none is named: the first of these that exists."""


@dataclass(frozen=True)
class Document:
    """A text, or the turns of a chat, and where it belongs."""

    text: str
    domain: str | None = None
    language: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    """The turns of a chat, for sources that hold them; rendered with `--chat` only."""


def read_documents(source: str, *, text_field: str = "text") -> Iterator[Document]:
    """Documents of `builtin`, a .txt, .jsonl or .parquet file, or `hf:DATASET[:CONFIG[:SPLIT]]`.

    In a .txt file each non-empty line is one; rows elsewhere have `text_field`, and may have
    `domain`, `language` and `messages`. Read one at a time, as far as they are asked for.
    Raises PromptError where the source is not there, empty, or has no such field.
    """
    if source == "builtin":
        return _builtin()
    if source.startswith("hf:"):
        if not source.removeprefix("hf:").partition(":")[0]:
            raise PromptError(f"{source!r} names no dataset; expected hf:DATASET[:CONFIG[:SPLIT]]")
        return _not_empty(_dataset(source.removeprefix("hf:"), text_field), source)
    path = Path(source)
    readers = {".txt": _lines, ".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise PromptError(
            f"{source!r} is no source of texts; expected builtin, self, hf:DATASET, "
            f"or a file that ends in {', '.join(readers)}"
        )
    if not path.is_file():
        raise PromptError(f"the file {source} does not exist; check the path")
    return _not_empty(readers[path.suffix.lower()](path, text_field), source)


def _builtin() -> Iterator[Document]:
    """The project's own documents, so ordered that any beginning holds the whole in small."""
    groups: dict[str, list[Document]] = defaultdict(list)
    for file in sorted(_builtin_folder().iterdir(), key=lambda file: file.name):
        for line in file.read_text(encoding="utf-8").splitlines():
            document = Document(**json.loads(line))
            # English is divided by domain, the rest by language: each group is spread evenly.
            group = document.domain if document.language == "en" else document.language
            groups[str(group)].append(document)
    places = [
        ((i + 0.5) / len(group), name, document)
        for name, group in groups.items()
        for i, document in enumerate(group)
    ]
    return iter([document for _, _, document in sorted(places, key=lambda place: place[:2])])


def _builtin_folder() -> Any:
    return resources.files("divergent_tokens") / "data" / "builtin"


def _lines(path: Path, _text_field: str) -> Iterator[Document]:
    for _, line in _utf8_lines(path):
        if line.strip():
            yield Document(line.strip())


def _json_lines(path: Path, text_field: str) -> Iterator[Document]:
    for number, line in _utf8_lines(path):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(
                f"{where} is not JSON ({error}); each line must be one object"
            ) from error
        if not isinstance(row, dict):
            raise PromptError(
                f"{where} holds {type(row).__name__}, not an object with a {text_field!r} field"
            )
        yield _row(row, text_field, where)


def _utf8_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from enumerate(file, start=1)
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{path} is not UTF-8 (byte {error.object[error.start]:#x} in its {error.reason}); "
            "convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror or error}") from error


def _parquet(path: Path, text_field: str) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise PromptError(
            f"reading {path} needs pyarrow: pip install 'divergent-tokens[data]'"
        ) from error
    try:
        file = ParquetFile(path)
        names = file.schema_arrow.names
        columns = [n for n in (text_field, "domain", "language", "messages") if n in names]
        _check_field(dict.fromkeys(names), text_field, str(path))
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                yield _row(row, text_field, str(path))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} is not a parquet file that can be read: {error}") from error


def _dataset(name: str, text_field: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise PromptError(
            f"hf:{name} needs datasets: pip install 'divergent-tokens[data]'"
        ) from error
    path, config, split = (*(part or None for part in name.split(":", 2)), None, None)[:3]
    try:
        if split is None:
            found = datasets.get_dataset_split_names(path, config)
            split = next((s for s in HF_SPLITS if s in found), found[0])
        for row in datasets.load_dataset(path, config, split=split, streaming=True):
            yield _row(row, text_field, f"hf:{name}")
    except PromptError:
        raise
    except Exception as error:  # the library raises its own, the hub's and the network's
        raise PromptError(
            f"the dataset hf:{name} cannot be read: {error}. "
            "Expected hf:DATASET[:CONFIG[:SPLIT]] with a name on the hub or a local folder"
        ) from error


def _row(row: Mapping[str, Any], text_field: str, where: str) -> Document:
    _check_field(row, text_field, where)
    text, domain, language = (
        _string(row, name, where) for name in (text_field, "domain", "language")
    )
    return Document(text or "", domain or None, language or None, _messages(row, where))


def _string(row: Mapping[str, Any], name: str, where: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise PromptError(f"{name!r} in {where} holds a lone surrogate, which is no text")
        return value
    if isinstance(value, int) and name in ("domain", "language"):  # a class label
        return str(value)
    raise PromptError(f"{name!r} in {where} is {type(value).__name__}, not a string")


def _messages(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, str], ...]:
    turns = row.get("messages")
    if turns is None:
        return ()
    if not isinstance(turns, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in turns
    ):
        raise PromptError(f"'messages' in {where} is no list of objects with 'role' and 'content'")
    return tuple(turns)


def _check_field(row: Mapping[str, Any], text_field: str, where: str) -> None:
    if text_field not in row and "messages" not in row:
        raise PromptError(
            f"{where} has no field {text_field!r}, only {', '.join(map(str, row))}; "
            "name the one that holds the text with --text-field"
        )


def _not_empty(documents: Iterator[Document], source: str) -> Iterator[Document]:
    first = next(documents, None)
    if first is None:
        raise PromptError(f"{source} holds no document; expected at least one")
    yield first
    yield from documents
