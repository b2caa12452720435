"""Things that are no files: pipes, devices, links out of the folder, folders."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.hostile_folders.texts import SMALL_FILES, clear
from tests.hostile_folders.values import brief

SECRET = "the content of a private file"


def _fifo(path: Path, place: Path) -> None:
    os.mkfifo(path)


def _device(path: Path, place: Path) -> None:
    path.symlink_to("/dev/zero")


def _tty(path: Path, place: Path) -> None:
    path.symlink_to("/dev/stdin")


def _outside(path: Path, place: Path) -> None:
    (place / "private.txt").write_text(SECRET)
    path.symlink_to(place / "private.txt")


def _outside_relative(path: Path, place: Path) -> None:
    (place / "private.txt").write_text(SECRET)
    path.symlink_to("../private.txt")


def _outside_folder(path: Path, place: Path) -> None:
    (place / "private").mkdir(exist_ok=True)
    (place / "private" / "a.jinja").write_text(SECRET)
    path.symlink_to(place / "private")


def _folder(path: Path, place: Path) -> None:
    path.mkdir()


def _dangling(path: Path, place: Path) -> None:
    path.symlink_to("nothing-there")


def _itself(path: Path, place: Path) -> None:
    path.symlink_to(path.name)


def _kernel(path: Path, place: Path) -> None:
    path.symlink_to("/proc/self/mem")


def _sparse(path: Path, place: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 << 30)


def _blobs(path: Path, place: Path) -> None:
    """As in the Hub's cache, but of another layout."""
    (place / "blobs").mkdir(exist_ok=True)
    (place / "blobs" / ("a" * 64)).write_text(SECRET)
    path.symlink_to(Path("../blobs") / ("a" * 64))


NODES = (
    *(_fifo, _device, _tty, _outside, _outside_relative, _outside_folder, _folder, _dangling),
    *(_itself, _kernel, _sparse, _blobs),
)
ODD_NAMES = (
    *("LICENSE\x1b[2J", "LICENSE\nx", "tokenizer_\ud800.json", "terms\u2028.txt", "a\\b.jinja"),
    *(
        "terms_of_use.txt",
        "NOTICE",
        "LICENSE-" + "x" * 240,
        "chat_template_x.json",
        ".hidden.jinja",
    ),
)


def node_in_place_of_a_file(rng: random.Random, folder: Path) -> str:
    """A pipe, a device, a link or a folder, where a loader or a copy expects a file."""
    there = sorted(path.name for path in folder.iterdir())
    file = rng.choice([*there, *SMALL_FILES, *ODD_NAMES])
    path = (
        folder / os.fsdecode(file.encode("utf-8", "surrogateescape"))
        if "\ud800" not in file
        else (folder / "tokenizer_\udcff.json")
    )
    make = rng.choice(NODES)
    clear(path)
    path.parent.mkdir(exist_ok=True)
    make(path, folder.parent)
    return f"{brief(file)}: {make.__name__[1:]}"
