"""What `--help` shows fits 80 columns and is cut nowhere."""

import pytest
from click.testing import CliRunner

from abliterator.cli import SECTIONS, main


@pytest.fixture
def help_of(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def lines(*arguments):
        done = CliRunner().invoke(main, [*arguments, "--help"], terminal_width=80)
        assert done.exit_code == 0
        return done.stdout.splitlines()

    return lines


def test_every_command_is_in_a_section(help_of):
    lines = help_of()
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line[2].isalpha()]
    commands = [name for names in SECTIONS.values() for name in names]
    assert len(set(commands)) == len(commands)
    assert {*commands, "push"} == set(main.commands)
    assert set(commands) <= set(listed)
    assert [line[:-1] for line in lines if line[:-1] in SECTIONS] == list(SECTIONS)
    assert "More:" not in lines


def test_no_short_help_is_cut(help_of):
    sections = help_of()
    assert max(map(len, sections)) <= 80
    assert not [line for line in sections if line.endswith("...") and "ARGS" not in line]


def test_a_study_stands_on_a_line_of_its_own(help_of):
    lines = help_of("study")
    names = ("extraction", "pairs", "alpha", "confirmation", "controls")
    assert [line.split()[0] for line in lines if line.strip().startswith(names)] == list(names)
    assert max(map(len, lines)) <= 80
