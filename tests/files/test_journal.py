"""Values are kept from when they are appended; what was not written whole is dropped."""

import pytest

from abliterator.errors import FileError
from abliterator.files import Journal


def test_values_come_back_in_order(tmp_path):
    path = tmp_path / "new" / "j.jsonl"
    journal = Journal(path)
    assert journal.values == []
    values = [{"x": 0.1 + 0.2, "text": "a\nb \udc80"}, [1, None], "last"]
    journal.append(*values[:2])
    journal.append(values[2])
    assert Journal(path).values == values


@pytest.mark.parametrize("cut", [1, 2, 8])
def test_a_last_line_that_is_not_whole_is_dropped(tmp_path, cut):
    path = tmp_path / "j.jsonl"
    Journal(path).append({"n": 1}, {"n": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(path)
    assert journal.values == [{"n": 1}]
    journal.append({"n": 3})
    assert Journal(path).values == [{"n": 1}, {"n": 3}]


def test_what_is_not_json_ends_it(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"n":1}\n\x00\x00\n{"n":2}\n')
    assert Journal(path).values == [{"n": 1}]
    assert path.read_bytes() == b'{"n":1}\n'


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        Journal(tmp_path / "file" / "j.jsonl").append(1)
