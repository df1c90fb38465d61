import json
import os
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from divergent_tokens.errors import RecordError
from divergent_tokens.store import (
    check_writable,
    content_key,
    default_cache,
    read_entry,
    replacing_file,
    replacing_folder,
    write_text,
    writing_entry,
)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def write_numbers(cache: Path, key: str = "key", n: int = 5) -> None:
    with writing_entry(cache, key) as writer:
        writer.header["n"] = n
        writer.array("numbers", (n,), np.int32)[:] = np.arange(n)


def test_an_entry_comes_back_as_it_was_written(tmp_path):
    write_numbers(tmp_path / "not" / "there" / "yet")
    entry = read_entry(tmp_path / "not" / "there" / "yet", "key")
    assert entry.header == {"n": 5}
    np.testing.assert_array_equal(entry.arrays["numbers"], np.arange(5))
    assert entry.arrays["numbers"].dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        entry.arrays["numbers"][0] = 1


def test_no_cache_and_no_entry_are_nothing(tmp_path):
    assert read_entry(None, "key") is None
    assert read_entry(tmp_path, "key") is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("header.json", None),
        ("header.json", b""),
        ("header.json", b"\xff"),
        ("header.json", b"{}"),
        ("header.json", b"[1]"),
        ("header.json", b"7"),
        ("header.json", b'{"arrays": 7}'),
        ("header.json", b'{"arrays": ["absent"]}'),
        ("numbers.npy", None),
        ("numbers.npy", b""),
        ("numbers.npy", b"\x93NUMPY"),
        ("numbers.npy", b"something else"),
    ],
)
def test_a_damaged_entry_is_nothing_and_is_replaced(tmp_path, name, content):
    write_numbers(tmp_path)
    path = tmp_path / "key" / name
    path.unlink() if content is None else path.write_bytes(content)
    assert read_entry(tmp_path, "key") is None
    write_numbers(tmp_path)
    assert read_entry(tmp_path, "key") is not None
    assert names(tmp_path) == ["key"]


def test_a_truncated_array_is_nothing(tmp_path):
    write_numbers(tmp_path, n=1000)
    path = tmp_path / "key" / "numbers.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert read_entry(tmp_path, "key") is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_entry_that_fails_on_the_way_leaves_nothing(tmp_path, error):

    def fail():
        with writing_entry(tmp_path, "key") as writer:
            writer.array("numbers", (5,), np.int32)
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


def test_an_entry_that_fails_leaves_the_one_before(tmp_path):
    write_numbers(tmp_path)
    with pytest.raises(ValueError, match="on the way"), writing_entry(tmp_path, "key"):
        raise ValueError("on the way")
    assert read_entry(tmp_path, "key").header == {"n": 5}
    assert names(tmp_path) == ["key"]


def test_content_key_depends_on_every_field_and_not_on_their_order():
    key = content_key(a=1, b=[2, None])
    assert key == content_key(b=[2, None], a=1)
    assert len({key, content_key(a=1, b=[2]), content_key(a=2, b=[2, None]), content_key(a=1)}) == 4
    assert len(key) == 64


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_that_fails_on_the_way_leaves_the_one_before(tmp_path, error):
    target = tmp_path / "out.json"
    target.write_text("before")

    def fail():
        with replacing_file(target) as path:
            path.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert target.read_text() == "before"
    assert names(tmp_path) == ["out.json"]


def test_a_file_is_not_there_before_it_is_whole(tmp_path):
    target = tmp_path / "out.json"
    with replacing_file(target) as path:
        path.write_text("half")
        assert not target.exists()
    assert target.read_text() == "half"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_folders_have_the_permissions_of_any_other(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "ours", "")
        (tmp_path / "plain").write_text("")
        write_numbers(tmp_path, "folder")
        (tmp_path / "plain-folder").mkdir()
    finally:
        os.umask(before)

    def mode(name):
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    assert mode("ours") == mode("plain")
    assert mode("folder") == mode("plain-folder")
    assert mode("folder/header.json") == mode("plain")


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    from divergent_tokens.errors import RecordError
    from divergent_tokens.store import write_text, writing_entry

    folder = Path(sys.argv[1])
    (folder / "text").write_text("before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        write_text(folder / "text", "x" * 10_000)
    except RecordError as error:
        print(error)
    try:
        with writing_entry(folder, "entry") as writer:
            writer.array("numbers", (100_000,), np.int8)
    except RecordError as error:
        print(error)
"""


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = found.stdout.splitlines()
    assert f"could not write {tmp_path / 'text'}" in first
    assert "nothing was left half written" in first
    assert f"could not write {tmp_path / 'entry'}" in second
    assert names(tmp_path) == ["text"]
    assert (tmp_path / "text").read_text() == "before"


MANY_WRITES = """
    import sys
    from pathlib import Path
    import numpy as np
    from divergent_tokens.store import writing_entry

    for _ in range(150):
        with writing_entry(Path(sys.argv[1]), "key") as writer:
            writer.header["by"] = int(sys.argv[2])
            writer.array("numbers", (100,), np.int32)[:] = int(sys.argv[2])
"""


def test_writers_at_the_same_time_do_not_disturb_each_other(tmp_path):
    code = textwrap.dedent(MANY_WRITES)
    command = [sys.executable, "-c", code, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert names(tmp_path) == ["key"]
    entry = read_entry(tmp_path, "key")
    assert set(entry.arrays["numbers"].tolist()) == {entry.header["by"]}


def test_an_arrays_room_on_the_disk_is_taken_at_once(tmp_path):
    """Writing into a hole of a mapped file on a full disk would kill the process."""
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system cannot")
    with writing_entry(tmp_path, "key") as writer:
        writer.array("numbers", (10**6,), np.int8)
        assert (writer.folder / "numbers.npy").stat().st_blocks * 512 >= 10**6


def test_replacing_folder_replaces_a_folder_with_other_files(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("")
    with replacing_folder(target) as folder:
        (folder / "new").write_text("")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["target"]


def test_a_stream_is_writable_where_its_folder_is_not():
    check_writable(Path("/dev/null"))


def test_check_writable_says_what_is_wrong_before_the_work(tmp_path):
    check_writable(tmp_path / "out.json")
    with pytest.raises(RecordError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(RecordError, match="does not exist"):
        check_writable(tmp_path / "absent" / "out.json")


def test_a_folder_that_is_not_there_is_a_record_error(tmp_path):
    with pytest.raises(RecordError, match="could not write"):
        write_text(tmp_path / "absent" / "out.json", "")


def test_the_cache_lies_where_the_system_has_it(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert default_cache() == Path("/scratch/divergent-tokens")
    for useless in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", useless)
        assert default_cache() == Path("/home/someone/.cache/divergent-tokens")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_cache() == Path("/home/someone/Library/Caches/divergent-tokens")


def test_the_header_is_plain_json(tmp_path):
    write_numbers(tmp_path)
    header = json.loads((tmp_path / "key" / "header.json").read_text())
    assert header == {"n": 5, "arrays": ["numbers"]}


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    for name, age_days in ((".old.unfinished", 2), (".new.unfinished", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age_days * 86400,) * 2)
    with replacing_folder(tmp_path / "whole"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".new.unfinished", "whole"}
