"""Comparisons whose answers come from vLLM, started for one side after the other; one stands in."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from abliterator.cli import main
from tests.helpers.vllm_interpreter import VERSION, vllm_interpreter

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="vLLM needs POSIX")


def test_each_side_is_answered_by_a_server_of_its_own(tiny_folder, tmp_path):
    base = tiny_folder("llama", dtype=torch.bfloat16)
    edited = tmp_path / "edited"
    edited.mkdir()
    for file in base.iterdir():
        (edited / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, edited / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "t.txt").write_text("Tell me about the moon.\nTell me about the sun.\n")
    command = [
        *("compare", str(base), str(edited), "--target", str(tmp_path / "t.txt")),
        *("--max-new-tokens", "3", "--device", "cpu", "--dtype", "float32", "--json"),
        *("--set", "engine.kind=vllm", "--set", "engine.arguments=[--stand-in-toy]"),
        *("--vllm-python", vllm_interpreter(tmp_path / "vllm")),
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    comparison = json.loads(result.stdout)
    for side in ("base", "edited"):
        engine = comparison["engines"][side]
        assert (engine["kind"], engine["version"]) == ("vllm", VERSION)
        assert (engine["model"], engine["dtype"]) == (side, "float32")
    assert result.stderr.count("starts") == 2
