"""llama.cpp's programs: found, and their refusals. The real ones run in tests/pipeline."""

from __future__ import annotations

import sys

import pytest

from abliterator.errors import QuantizationError
from abliterator.survival import LlamaCpp, convert, find_llama_cpp, llama_server, quantize

NAMES = ("convert_hf_to_gguf.py", "llama-quantize", "llama-server")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the programs are scripts")


def program(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("place", [".", "build/bin"])
def test_programs_are_found_in_a_clone(place, tmp_path):
    for name in NAMES:
        program(tmp_path / ("." if name.endswith(".py") else place), name, "")
    found = find_llama_cpp(tmp_path)
    assert [path.name for path in found] == list(NAMES)


def test_programs_are_found_on_path(tmp_path, monkeypatch):
    for name in NAMES:
        program(tmp_path, name, "#!/bin/sh\necho 'version: 123 (abc)' >&2\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_llama_cpp()
    assert found.server == tmp_path / "llama-server"


def test_a_missing_program_is_named_with_what_to_install(tmp_path, monkeypatch):
    program(tmp_path, "llama-quantize", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QuantizationError) as raised:
        find_llama_cpp()
    message = str(raised.value)
    assert "of which convert_hf_to_gguf.py, llama-server is not on PATH" in message
    assert "--llama-cpp FOLDER" in message


def test_the_version_is_what_the_server_states(tmp_path):
    server = program(tmp_path, "llama-server", "#!/bin/sh\necho 'version: 123 (abc)' >&2\n")
    assert LlamaCpp(server, server, server).version == "llama.cpp 123"


def refusing(tmp_path):
    converter = program(
        tmp_path,
        "convert_hf_to_gguf.py",
        "import helper_beside\nraise SystemExit('first\\nModel FooForCausalLM is not supported')\n",
    )
    program(tmp_path, "helper_beside.py", "")
    other = program(tmp_path, "llama", "#!/bin/sh\necho 'unknown type' >&2\nexit 3\n")
    return LlamaCpp(converter, other, other)


def test_refusals_have_the_last_lines_of_the_program(tmp_path):
    tools, log = refusing(tmp_path), tmp_path / "log"
    with pytest.raises(QuantizationError, match="first / Model FooForCausalLM is not supported"):
        convert(tools, tmp_path, tmp_path / "out.gguf", kind="bf16", log=log)
    with pytest.raises(QuantizationError, match=r"status 3.*unknown type") as raised:
        quantize(tools, tmp_path / "a.gguf", tmp_path / "b.gguf", kind="Q8_0", log=log)
    assert "FooForCausalLM" not in str(raised.value)
    with (
        pytest.raises(QuantizationError, match=r"does not serve b\.gguf.*unknown type"),
        llama_server(tools, tmp_path / "b.gguf", name="b", context=8, slots=1, log=log),
    ):
        pass
