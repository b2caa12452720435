"""A bake whose worker dies in the middle of a file, which workers import from here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterator.bake import _write
from abliterator.bake._workers import BakeFile
from abliterator.workers import Resident


@dataclass(frozen=True)
class DeadlyBakeFile(BakeFile):
    """Dies when the first tensor of the second file is edited, once, and notes what is there."""

    @property
    def note(self) -> Path:
        """What the folder held when the worker died."""
        return self.out.with_name("died")

    @contextmanager
    def opened(self, resident: Resident) -> Iterator[Callable[[str], Any]]:
        edit_stored, file = _write.edit_stored, self.checkpoint.weight_files[1]

        def die_once(buffer, edit, *arguments, **options):
            if edit.info.file == file and not self.note.exists():
                self.note.write_text("\n".join(path.name for path in self.out.iterdir()))
                os._exit(9)
            return edit_stored(buffer, edit, *arguments, **options)

        _write.edit_stored = die_once
        try:
            with super().opened(resident) as write:
                yield write
        finally:
            _write.edit_stored = edit_stored
