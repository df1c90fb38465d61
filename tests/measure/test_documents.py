import itertools
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet
import pytest

from divergent_tokens.errors import PromptError
from divergent_tokens.measure.documents import Document, read_documents


def read(path, **options):
    return list(read_documents(str(path), **options))


def json_lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def parquet(path, **columns):
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def builtin():
    return list(read_documents("builtin"))


def test_builtin_is_large_and_varied_enough(builtin):
    assert len(builtin) >= 128
    assert len({document.domain for document in builtin}) >= 8
    assert len({document.language for document in builtin}) >= 8
    assert len({document.text for document in builtin}) == len(builtin)
    for document in builtin:
        if document.language in ("zh", "ja"):
            assert len(document.text) >= 200, document
        else:
            assert len(document.text.split()) >= 80, document


def test_any_beginning_of_builtin_holds_the_whole_in_small(builtin):
    """Each group's share of the first n documents is its share of all, to within one document."""

    def group(document):
        return document.domain if document.language == "en" else document.language

    sizes = Counter(map(group, builtin))
    for n in range(1, len(builtin) + 1):
        found = Counter(map(group, builtin[:n]))
        for name, size in sizes.items():
            assert abs(found[name] - n * size / len(builtin)) < 2


def test_each_line_of_a_text_file_that_is_not_empty_is_a_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\r\n  two words \n\u2028\nthree".encode())
    assert [document.text for document in read(path)] == ["one", "two words", "three"]


def test_rows_have_text_domain_language_and_messages(tmp_path):
    turns = [{"role": "user", "content": "hi"}]
    path = json_lines(
        tmp_path / "a.jsonl",
        {"text": "one"},
        {"text": "two\u2028lines", "domain": "news", "language": "de", "other": 5},
        {"messages": turns},
        {"text": "labels", "domain": 3, "language": None},
    )
    assert read(path) == [
        Document("one"),
        Document("two\u2028lines", "news", "de"),
        Document("", messages=tuple(turns)),
        Document("labels", "3"),
    ]


def test_the_text_field_can_have_another_name(tmp_path):
    path = json_lines(tmp_path / "a.JSONL", {"text": "no", "body": "yes"})
    assert read(path, text_field="body") == [Document("yes")]


def test_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["one", None], domain=["x", "y"], n=[1, 2])
    assert read(path) == [Document("one", "x"), Document("", "y")]
    messages = [[{"role": "user", "content": "hi"}]]
    path = parquet(tmp_path / "b.parquet", messages=messages)
    assert read(path)[0].messages == ({"role": "user", "content": "hi"},)


def test_a_local_dataset_folder_is_streamed(tmp_path):
    json_lines(tmp_path / "train.jsonl", {"text": "from train", "domain": "c"})
    assert read(f"hf:{tmp_path}") == [Document("from train", "c")]
    json_lines(tmp_path / "test.jsonl", {"text": "from test", "domain": "d"})
    assert read(f"hf:{tmp_path}") == [Document("from test", "d")]
    for name in (f"hf:{tmp_path}::train", f"hf:{tmp_path}:default:train"):
        assert read(name) == [Document("from train", "c")]


def test_documents_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\nbroken')
    assert [d.text for d in itertools.islice(read_documents(str(path)), 2)] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no document"),
        ("a.txt", b"\n \n", "holds no document"),
        ("a.jsonl", b"", "holds no document"),
        ("a.txt", b"fine\nb\xe4d", "not UTF-8"),
        ("a.jsonl", b'{"text": "b\xe4d"}', "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 of .* is not JSON"),
        ("a.jsonl", b'["text"]', "line 1 of .* holds list"),
        ("a.jsonl", b'{"body": "a", "id": 1}', "no field 'text', only body, id"),
        ("a.jsonl", b'{"text": 5}', "'text' in line 1 of .* is int, not a string"),
        ("a.jsonl", b'{"text": ["a"]}', "is list, not a string"),
        ("a.jsonl", b'{"text": "a", "domain": ["b"]}', "'domain' in .* is list, not a string"),
        ("a.jsonl", b'{"text": "a", "language": {}}', "'language' in .* is dict, not a string"),
        ("a.jsonl", b'{"messages": "hello"}', "'messages' in .* is no list"),
        ("a.jsonl", b'{"messages": ["hello"]}', "'messages' in .* is no list"),
        ("a.jsonl", b'{"messages": [{"content": "hello"}]}', "'messages' in .* is no list"),
        ("a.jsonl", b'{"text": "\\ud800"}', "lone surrogate"),
        ("a.parquet", b"", "not a parquet file"),
        ("a.parquet", b"PAR1 and something else PAR1", "not a parquet file"),
        ("a.csv", b"text", "is no source of texts"),
    ],
)
def test_bad_files_are_one_clear_message(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PromptError, match=message):
        read(path)


def test_bad_parquet_columns_are_one_clear_message(tmp_path):
    with pytest.raises(PromptError, match="no field 'text', only body"):
        read(parquet(tmp_path / "a.parquet", body=["one"]))
    with pytest.raises(PromptError, match="is float, not a string"):
        read(parquet(tmp_path / "b.parquet", text=[1.5]))
    with pytest.raises(PromptError, match="holds no document"):
        read(parquet(tmp_path / "c.parquet", text=pa.array([], pa.string())))


def test_a_truncated_parquet_file(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=[f"row {i}" for i in range(1000)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(PromptError, match="not a parquet file"):
        read(path)


@pytest.mark.parametrize("name", ["absent.txt", "absent.parquet", "folder.jsonl"])
def test_a_file_that_is_not_there(tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(PromptError, match="does not exist"):
        read(tmp_path / name)


def test_datasets_that_cannot_be_read(tmp_path):
    with pytest.raises(PromptError, match="'hf:' names no dataset"):
        read("hf:")
    with pytest.raises(PromptError, match=r"dataset hf:.*absent cannot be read"):
        read(f"hf:{tmp_path / 'absent'}")
    json_lines(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(PromptError, match=r"cannot be read.*validation"):
        read(f"hf:{tmp_path}:default:validation")
    with pytest.raises(PromptError, match="no field 'body'"):
        read(f"hf:{tmp_path}", text_field="body")
