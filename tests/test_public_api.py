import subprocess
import sys

import pytest

import abliterator


def test_the_door_is_sorted_and_every_name_is_there():
    assert abliterator.__all__ == sorted(abliterator.__all__)
    assert set(abliterator.__all__) == set(abliterator._PACKAGE)
    for name in abliterator.__all__:
        assert getattr(abliterator, name) is not None


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        abliterator.nonsense  # noqa: B018


HEAVY = ("torch", "transformers", "lm_eval", "datasets", "openai", "scipy", "numpy")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["build", "--help"], ["plan", "PLAN"], ["init", "PLAN"]],
    ids=["help", "build", "plan", "init"],
)
def test_help_and_plan_import_nothing_heavy(arguments, tiny_folder):
    """Counted in a fresh process: what was imported, not how long it took."""
    arguments = [str(tiny_folder()) if a == "PLAN" else a for a in arguments]
    code = (
        "import sys\n"
        "from abliterator.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"print('heavy:', [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout
