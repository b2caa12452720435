"""Text files: UTF-8 whatever the locale, bounded, and lines that a line feed alone ends."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from abliterator.errors import FileError
from abliterator.files import (
    as_lines,
    digest_of,
    link_file,
    open_regular,
    portable_name,
    read_lines,
    read_text,
    sha256_of_bytes,
    sha256_of_file,
    sha256_of_lines,
    sha256_of_range,
    write_text_atomic,
)
from tests.helpers.windows_rules import fault_of_name, windows_rules

ANY = st.text(st.characters(exclude_categories=["Cs"]))


@given(ANY)
def test_a_text_comes_back_as_it_was_written(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text"
    write_text_atomic(path, text)
    assert read_text(path) == text.removeprefix("\ufeff")


@given(st.lists(ANY))
def test_json_lines_hold_any_text(tmp_path_factory, texts):
    """Also U+2028, U+2029 and U+0085, at which `str.splitlines` cuts."""
    path = tmp_path_factory.getbasetemp() / "lines"
    write_text_atomic(path, as_lines(json.dumps([text], ensure_ascii=False) for text in texts))
    assert [json.loads(line)[0] for line in read_lines(path)] == texts


def test_line_ends_of_windows_and_blank_lines_are_read(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert [json.loads(line)["a"] for line in read_lines(path)] == [1, 2]


@pytest.mark.parametrize("data", [b"caf\xe9", b"\xff\xfeh\0i\0", b"\xed\xa0\x80"])
def test_what_is_no_utf_8_is_named(data, tmp_path):
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(FileError, match="not UTF-8"):
        read_text(tmp_path / "text")


def test_a_text_has_a_largest_size(tmp_path):
    (tmp_path / "text").write_text("12345", encoding="utf-8")
    assert read_text(tmp_path / "text", max_bytes=5) == "12345"
    with pytest.raises(FileError, match=r"5 bytes; at most 4"):
        read_text(tmp_path / "text", max_bytes=4)


@pytest.mark.skipif(os.name != "posix", reason="no FIFO, no /dev/zero")
def test_pipes_devices_and_folders_are_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zeros", tmp_path, tmp_path / "none"):
        with pytest.raises(FileError):
            read_text(path)
        with pytest.raises(FileError):
            sha256_of_file(path)


def test_digests(tmp_path):
    data = bytes(range(256)) * 1000
    (tmp_path / "data").write_bytes(data)
    assert sha256_of_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()
    assert digest_of({"b": 1, "a": ["é"]}) == digest_of(json.loads('{"a": ["\\u00e9"], "b": 1}'))
    assert digest_of([1]) != digest_of([1.0])


@pytest.mark.parametrize("text", [b"", b"a", b"a\n", b"a\n\nb\n", b"a\rb\n", b"\n" * 9])
def test_a_digest_of_lines_is_that_of_the_file_with_line_feeds(tmp_path, text):
    (tmp_path / "lf").write_bytes(text)
    (tmp_path / "crlf").write_bytes(text.replace(b"\n", b"\r\n"))
    assert sha256_of_lines(tmp_path / "lf") == hashlib.sha256(text).hexdigest()
    assert sha256_of_lines(tmp_path / "crlf") == hashlib.sha256(text).hexdigest()
    (tmp_path / "lf").write_bytes(text + b"\r")
    assert sha256_of_lines(tmp_path / "lf") == hashlib.sha256(text + b"\r").hexdigest()


CHUNK = 256 << 10  # bytes hashed at once


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_the_digest_of_a_range_has_every_chunk(start, size, tmp_path):
    data = hashlib.shake_128(b"data").digest(start + size + 5)
    path = tmp_path / "data"
    path.write_bytes(data)
    with open_regular(path) as file:
        file.stream.seek(2)
        digest = sha256_of_range(file, start, size)
        assert file.stream.tell() == 2  # other threads read this stream
    assert digest == hashlib.sha256(data[start : start + size]).hexdigest()
    assert digest == sha256_of_bytes(memoryview(data)[start : start + size])


def test_a_range_that_ends_beyond_its_file_has_no_digest(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(CHUNK + 9))
    with open_regular(path) as file, pytest.raises(FileError, match="ended 1 bytes early"):
        sha256_of_range(file, 10, CHUNK)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_a_locale_changes_nothing(encoding, tmp_path):
    path = tmp_path / "text"
    write_text_atomic(path, "café – 日本")
    code = (
        "import sys; from pathlib import Path; from abliterator.files import read_text; "
        "sys.stdout.buffer.write(read_text(Path(sys.argv[1])).encode())"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**environment, "PYTHONIOENCODING": encoding},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode() == "café – 日本"


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
@example("con", "con.").via("devices")
@example("a%3Ab", "a:b").via("already encoded")
@example("NUL .txt", "../..").via("devices, folders")
def test_names_of_files_are_legal_everywhere_and_differ_as_their_texts_do(one, other):
    names = [portable_name(text, ".json") for text in (one, other)]
    assert not any(fault_of_name(name) for name in names)
    assert (names[0] == names[1]) == (one == other)


@pytest.mark.parametrize("name", ["mmlu_pro", "toy-1.5", "ein Wert (ü)", "context", "nullable"])
def test_plain_names_stay_as_they_are(name):
    assert portable_name(name, ".json") == f"{name}.json"


def test_a_file_is_linked_or_copied(tmp_path, monkeypatch):
    """By the first that the system lets be made: a symbolic link, a hard link, a copy."""
    source = tmp_path / "source"
    source.write_text("content")
    link_file(source, tmp_path / "symbolic")
    assert (tmp_path / "symbolic").readlink() == source
    (tmp_path / "rules").mkdir()
    with windows_rules(tmp_path / "rules"):
        link_file(tmp_path / "symbolic", tmp_path / "rules" / "hard")
        monkeypatch.setattr(os, "link", refuse)  # as to another disk, and on FAT
        link_file(source, tmp_path / "rules" / "copy")
    assert source.stat().st_nlink == 2
    assert (tmp_path / "rules" / "hard").samefile(source)
    assert (tmp_path / "rules" / "copy").read_text() == "content"


def refuse(*_):
    raise OSError("not on this disk")
