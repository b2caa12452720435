"""Finished parts of unfinished work, one JSON value a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abliterator.files._read import readable
from abliterator.files._write import writable


class Journal:
    """A file of JSON values, each kept from when it is appended.

    What was appended outlives the process, however that ends. A last line that was not written
    whole is dropped, with whatever is not JSON.

    Attributes:
        values: those that an earlier process appended, in order.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: list[Any] = []
        if not path.is_file():
            return
        with readable(path):
            data = path.read_bytes()
        end = 0
        while (stop := data.find(b"\n", end)) >= 0:
            try:
                self.values.append(json.loads(data[end:stop]))
            except ValueError:
                break
            end = stop + 1
        if end < len(data):
            with writable(path, 0), path.open("r+b") as file:
                file.truncate(end)

    def append(self, *values: Any) -> None:
        """Writes values to the end of the file.

        Raises:
            FileError: if there is no room, or the file cannot be written.
        """
        lines = "".join(json.dumps(value, separators=(",", ":")) + "\n" for value in values)
        data = lines.encode()
        with writable(self._path, len(data)):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                file.write(data)
