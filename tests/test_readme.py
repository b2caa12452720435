"""Every command and every block of Python in the README runs, on the embedded model."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from abliterator.cli import main
from abliterator.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = re.findall(r"`abliterator ([^`]+)`", " ".join(README.split()))
# What a reader puts in the place of a word in capitals.
GIVEN = {
    "MODEL": "embedded:demo",
    "BASE": "embedded:demo",
    "EDITED": "out/recipe",
    "Q.safetensors": "out/recipe/work/directions.safetensors",
    "NAME": "somebody/edited",
}
# In the order in which a reader gives them, whatever the README's.
ORDER = (
    "recipes",
    "init",
    "plan",
    "build",
    "report",
    "chat",
    "verify",
    "leak",
    "publish",
    "survive",
)
# Those that take a minute are commands of other tests: of the demo, and of the package's options.
ELSEWHERE = {"demo", "doctor", "--help"}


def arguments(command: str) -> list[str]:
    return [GIVEN.get(word, word) for word in shlex.split(command)]


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes" / "demo", "demo")
    short = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text("utf-8"))
    short |= {"rollouts": {"limit": 6, "max_new_tokens": 24}}
    short.pop("benchmarks")
    named = {command.split()[0]: command for command in COMMANDS if command.split()[0] in ORDER}
    assert {command.split()[0] for command in COMMANDS} <= {*ORDER, *ELSEWHERE}
    assert tuple(sorted(named, key=ORDER.index)) == ORDER
    seen = set()
    for command in sorted(set(COMMANDS), key=lambda c: [*ELSEWHERE, *ORDER].index(c.split()[0])):
        name = command.split()[0]
        if name in ELSEWHERE or command in ("report", "leak"):
            continue
        done = CliRunner().invoke(main, arguments(command), input="Name a planet.\n")
        assert done.exit_code == 0, f"{command}\n{done.output}"
        if name == "init":
            assert load_recipe(Path("recipe.yaml")).model == GIVEN["MODEL"]
            Path("recipe.yaml").write_text(yaml.safe_dump(short), encoding="utf-8")
        seen.add(name)
    assert seen == {*ORDER}


@pytest.mark.slow
def test_its_python_runs(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    quick = block.replace('["k=1"]', '["k=1", "rollouts.limit=4", "benchmarks={tasks: []}"]')
    assert quick != block
    scope: dict[str, object] = {}
    exec(quick.replace('Path("out/demo")', f"Path({str(tmp_path / 'out')!r})"), scope)
    assert scope["record"].behaviour["target"].edited.refusal.n == 4
