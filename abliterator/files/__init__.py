"""Files: checked reading, atomic writing and copying, SHA-256, canonical digests, free disk space.

The lowest package that touches a disk. Text is UTF-8 in every locale. A file is read only if it is
a regular file and, where it is held in memory, of a bounded size. It is written under another name,
flushed and renamed: afterwards it is complete, or unchanged. Contents are not interpreted.

    write_text_atomic(path, as_lines(line for line in lines))
    lines = read_lines(path)
"""

from abliterator.files._cache import cache_folder
from abliterator.files._data import package_yaml
from abliterator.files._digest import (
    digest_of,
    sha256_of_bytes,
    sha256_of_file,
    sha256_of_lines,
    sha256_of_range,
)
from abliterator.files._folder import is_closed, require_plain_folder, require_regular_files, walk
from abliterator.files._hashes import FileHashes
from abliterator.files._journal import Journal
from abliterator.files._read import (
    OpenFile,
    damaged,
    open_regular,
    opened_again,
    read_fully,
    readable,
    require_utf8_name,
    shown,
)
from abliterator.files._text import as_lines, read_bytes, read_lines, read_text, too_large
from abliterator.files._write import (
    copy_file,
    copy_range,
    free_bytes,
    link_file,
    partial_of,
    portable_name,
    refuse_same_file,
    replacing,
    writable,
    write_bytes_atomic,
    write_fully,
    write_text_atomic,
)

__all__ = [
    "FileHashes",
    "Journal",
    "OpenFile",
    "as_lines",
    "cache_folder",
    "copy_file",
    "copy_range",
    "damaged",
    "digest_of",
    "free_bytes",
    "is_closed",
    "link_file",
    "open_regular",
    "opened_again",
    "package_yaml",
    "partial_of",
    "portable_name",
    "read_bytes",
    "read_fully",
    "read_lines",
    "read_text",
    "readable",
    "refuse_same_file",
    "replacing",
    "require_plain_folder",
    "require_regular_files",
    "require_utf8_name",
    "sha256_of_bytes",
    "sha256_of_file",
    "sha256_of_lines",
    "sha256_of_range",
    "shown",
    "too_large",
    "walk",
    "writable",
    "write_bytes_atomic",
    "write_fully",
    "write_text_atomic",
]
