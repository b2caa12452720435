"""Each of Windows' rules refuses what it should, and nothing outside of its folder and block."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

import pytest

from abliterator import processes
from abliterator.errors import FileError
from abliterator.files import write_text_atomic
from tests.helpers.windows_rules import (
    LONGEST_FILE,
    LONGEST_FOLDER,
    ROOT,
    fault_of_name,
    package_modules,
    windows_rules,
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rules" / "file.txt"
    path.parent.mkdir()
    path.write_text("content")
    with windows_rules(path.parent):
        yield path


def refusal(work, *arguments) -> int | None:
    """The `winerror` of what is raised."""
    with pytest.raises(OSError) as caught:  # noqa: PT011
        work(*arguments)
    return getattr(caught.value, "winerror", None)


OPERATIONS = {
    "deleted": Path.unlink,
    "renamed": lambda path: path.replace(path.with_name("other")),
    "replaced": lambda path: path.with_name("new").replace(path),
    "in a folder that is renamed": lambda path: path.parent.joinpath("sub").replace("elsewhere"),
    "in a folder that is deleted": lambda path: shutil.rmtree(path.parent / "sub"),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("mapped", [False, True], ids=["open", "mapped"])
def test_what_is_in_use_stays(file, tmp_path, monkeypatch, operation, mapped):
    monkeypatch.chdir(tmp_path)
    inner = file.parent / "sub" / "inner.txt"
    inner.parent.mkdir()
    for path in (inner, file.with_name("new")):
        path.write_text("x")
    streams = [path.open("rb") for path in (file, inner)]
    maps = [mmap.mmap(s.fileno(), 0, access=mmap.ACCESS_READ) for s in streams if mapped]
    if mapped:
        for stream in streams:
            stream.close()
    assert refusal(operation, file) == 32
    for held in (*streams, *maps):
        held.close()
    operation(file)


def test_a_mapped_file_is_not_emptied(file):
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ):
        assert refusal(file.write_text, "") == 1224
    file.write_text("")


def test_a_rename_replaces_nothing(file):
    other = file.with_name("other")
    other.write_text("x")
    assert refusal(os.rename, other, file) == 183
    assert refusal(other.rename, file) == 183
    other.replace(file)
    file.rename(other)


def test_no_symbolic_links(file):
    assert refusal(file.with_name("link").symlink_to, file) == 1314
    file.with_name("hard").hardlink_to(file)


def test_folders_are_not_opened_and_only_what_is_written_is_flushed(file):
    (file.parent / "sub").mkdir()
    assert refusal(os.open, file.parent / "sub", os.O_RDONLY) == 5
    with file.open("rb") as stream:
        assert refusal(os.fsync, stream.fileno()) == 6
    with file.open("ab") as stream:
        os.fsync(stream)


NO_NAMES = ["CON", "nul", "Aux.json", "com1.tar.gz", "LPT9", "a:b", "a?", "a*", 'a"', "a|b", "a<b"]
NAMES = ["config.json", ".partial", "con-1", "null", "COM10", "NULS.txt", "ü", "a b.txt", "..a"]


@pytest.mark.parametrize("name", [*NO_NAMES, "a.", "a ", "NUL .txt", "a\x01b", "a\\b", "a\nb"])
def test_reserved_names_are_refused(file, name):
    path = file.with_name(name)
    assert fault_of_name(name)
    for work in (path.touch, path.mkdir, lambda: file.replace(path), lambda: path.write_text("")):
        assert refusal(work) == 123


@pytest.mark.parametrize("name", NAMES)
def test_other_names_are_not(file, name):
    file.with_name(name).write_text("")
    assert fault_of_name(name) is None


def test_names_that_differ_in_case_are_one(file):
    (file.parent / "Sub").mkdir()
    assert refusal((file.parent / "sub").mkdir) == 183
    assert refusal((file.parent / "File.TXT").write_text, "") == 183
    assert refusal((file.parent / "sub" / "file").write_text, "") == 183
    file.write_text("again")


def test_paths_have_a_longest_length(file):
    length = LONGEST_FILE - len(ROOT) - 1
    deep = file.parent / ("a" * 120)
    deep.mkdir()
    (deep / ("b" * (length - 121))).write_text("")
    assert refusal((deep / ("b" * (length - 120))).write_text, "") == 206
    folder = LONGEST_FOLDER - len(ROOT) - 1
    (file.parent / ("c" * folder)).mkdir()
    assert refusal((file.parent / ("d" * (folder + 1))).mkdir) == 206


@pytest.mark.usefixtures("file")
def test_the_package_sees_the_modules_of_windows():
    assert (processes.sys.platform, processes.os.name) == ("win32", "nt")
    for module, name in (("os", "killpg"), ("os", "sysconf"), ("signal", "SIGKILL")):
        assert not hasattr(getattr(processes, module), name)
    assert processes.os.fspath is os.fspath
    assert len(package_modules()) > 200


def test_outside_of_folder_and_block_all_is_as_ever(tmp_path):
    folder = tmp_path / "rules"
    folder.mkdir()
    with windows_rules(folder):
        for name in ("a", "A", "NUL", "b?"):
            (tmp_path / name).write_text("x")
        (tmp_path / "link").symlink_to(folder)
        with (tmp_path / "A").open():
            (tmp_path / "a").rename(tmp_path / "A")
    assert hasattr(processes.os, "killpg")
    for name in ("a", "A", "NUL", "b?"):
        (folder / name).write_text("x")
    with (folder / "A").open():
        (folder / "a").rename(folder / "A")


def test_an_atomic_write_over_a_file_in_use_is_a_named_error(file):
    write_text_atomic(file, "new")
    with file.open("rb"), pytest.raises(FileError, match="cannot be written"):
        write_text_atomic(file, "newer")
    assert file.read_text() == "new"
    assert list(file.parent.iterdir()) == [file]
