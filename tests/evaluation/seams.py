"""What tests of other packages replace or read here, though no setting reaches it."""

from __future__ import annotations

import errno

from abliterator.evaluation import _paths


class _Full:
    """A stream on a disk that is full after so many bytes."""

    def __init__(self, stream, n_bytes: int) -> None:
        self.stream, self.left = stream, n_bytes

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.stream.write(data)


def fill_disk_under_logits(monkeypatch, n_bytes: int) -> None:
    """Lets files of logits be written up to this size."""
    real, streams = _paths.write_fully, {}

    def write(out, data):
        full = streams.setdefault(out.path, _Full(out.stream, n_bytes))
        real(out._replace(stream=full), data)

    monkeypatch.setattr(_paths, "write_fully", write)
