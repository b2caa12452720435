"""What is planned is loaded in a process of its own, also where the system makes no links."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from abliterator.errors import PublishError
from abliterator.files import sha256_of_bytes
from abliterator.processes import python_command
from abliterator.publish import Target, _files, _load_check, plan_publish
from abliterator.publish._files import PlannedFile
from tests.helpers.quantised import save_quantised
from tests.helpers.tiny import VOCABULARY
from tests.helpers.windows_rules import windows_rules


def test_a_plan_loads_on_windows(built, out, tmp_path, monkeypatch):
    """Without its developer mode, it makes no symbolic links; on the same disk, hard links."""
    monkeypatch.setattr(_files, "HELD_BYTES", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plan = plan_publish(built[0], out / "checkpoint", Target("somebody/a"))
    assert any(isinstance(file.content, Path) for file in plan.files)
    with windows_rules(tmp_path):
        _load_check.check_loads(plan)
    assert list(tmp_path.iterdir()) == [out]


def test_a_format_that_transformers_does_not_know(built, out, tmp_path, tiny_tokenizer):
    """ModelOpt's NVFP4 is loaded as every stage of a build loads it."""
    folder = save_quantised("modelopt", tmp_path / "model", vocabulary=VOCABULARY)
    tiny_tokenizer.save_pretrained(folder)

    def files():
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            yield PlannedFile(
                path=path.name, size=len(data), sha256=sha256_of_bytes(data), content=data
            )

    plan = plan_publish(built[0], out / "checkpoint", Target("somebody/a"))
    _load_check.check_loads(replace(plan, files=tuple(files())))
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"intermediate_size": 384', '"intermediate_size": 380')
    )
    with pytest.raises(PublishError, match="abliterator, which alone"):
        _load_check.check_loads(replace(plan, files=tuple(files())))


def test_the_process_ends_with_its_parent(tmp_path):
    """At once: it does not find out that there is no model to load."""
    script = Path(_load_check.__file__).with_name("_load_check_child.py")
    done = subprocess.run(
        python_command(str(script), str(tmp_path)), stdin=subprocess.DEVNULL, capture_output=True
    )
    assert (done.returncode, done.stderr) == (1, b"")
