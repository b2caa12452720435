"""A comparison whose answers come from a server, against one in this process."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from abliterator.cli import main
from abliterator.comparison import CompareSettings, compare, to_markdown
from abliterator.engines import TransformersEngine
from abliterator.errors import ServerError
from abliterator.model import load_model
from abliterator.recipe import load_engine
from tests.comparison.changes import copied, rewrite
from tests.helpers.answer_server import AnswerServer, answers_of

PROMPTS = {"target": ["Tell me about a."], "neutral": ["Name a b.", "Name a longer c."]}


@pytest.fixture
def sides(tiny_folder, tmp_path):
    """Base and edited folder; the edited one has other weights and another stop token."""
    base = tiny_folder("llama", dtype=torch.float32)

    def other_stop(config):
        config["eos_token_id"] = [2, 9]

    return base, copied(base, tmp_path / "edited", rewrite("generation_config.json", other_stop))


@pytest.fixture
def server(sides):
    loaded = [
        TransformersEngine(load_model(folder, device="cpu", dtype="float32")) for folder in sides
    ]
    models = {
        name: answers_of(partial(lambda engine: engine, engine))
        for name, engine in zip(("base", "edited"), loaded, strict=True)
    }
    with AnswerServer(models, loaded[0].tokenizer) as server:
        yield server


def settings(server=None, **engine):
    if server is None:
        return CompareSettings(prompts=PROMPTS, max_new_tokens=5, kl_tokens=3)
    values = {"kind": "server", "base_url": server.url, "base": "base", **engine}
    section = load_engine([f"engine.{key}={value}" for key, value in values.items()])
    return CompareSettings(prompts=PROMPTS, max_new_tokens=5, kl_tokens=3, engine=section)


def test_a_served_comparison_has_the_figures_of_one_in_process(sides, server, tmp_path):
    scratch = [tmp_path / name for name in ("inside", "served")]
    for folder in scratch:
        folder.mkdir()
    inside = compare(*sides, settings(), scratch=scratch[0])
    served = compare(*sides, settings(server), scratch=scratch[1])
    assert inside.engines == {}
    assert set(served.engines) == {"base", "edited"}
    assert served.model_copy(update={"engines": {}}) == inside
    # both sides stop at the base's stop token alone; the probe of the edited one asks as it is
    assert served.asked == "as_base"
    stops = Counter(tuple(body["stop_token_ids"]) for body in server.bodies)
    assert stops == {(2,): 9, (2, 9): 1}
    assert "Answers of edited come from a server: `edited` of `vllm` `0.33.0`" in to_markdown(
        served
    )
    assert "from a server" not in to_markdown(inside)


def test_a_server_is_checked_before_weights_are_read(sides, server, tmp_path):
    with pytest.raises(ServerError, match=r"not `other`, under which the edited model"):
        compare(*sides, settings(server, edited="other"), scratch=tmp_path)
    assert len(server.bodies) == 1


def test_the_command(sides, server, tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(PROMPTS["target"]))
    command = ["compare", *map(str, sides), "--target", str(tmp_path / "t.txt"), "--device", "cpu"]
    command += ["--set", "engine.kind=server", "--set", f"engine.base_url={server.url}"]
    command += ["--max-new-tokens", "5"]
    wrong = CliRunner().invoke(main, command)
    assert wrong.exit_code == 1
    assert f"not `{sides[0]}`" in wrong.output  # by default the name that the command gives
    done = CliRunner().invoke(main, [*command, "--set", "engine.base=base"])
    assert done.exit_code == 0, done.output
    assert "Answers of base come from a server" in done.output
