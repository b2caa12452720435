"""The command line: reads arguments, calls the packages, prints results.

Results go to stdout (`--json` for machines), bars and notes to stderr. Exit codes: 0 done, 1 an
error with a name, 2 usage, 130 interrupted, 128 + n ended by signal n. Nothing heavy is imported
before a command runs.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
from typing import Any

import click

from abliterator.cli._bake import bake
from abliterator.cli._build import build
from abliterator.cli._chat import chat
from abliterator.cli._compare import compare
from abliterator.cli._control_vector import control_vector
from abliterator.cli._demo import demo
from abliterator.cli._doctor import doctor
from abliterator.cli._init import init
from abliterator.cli._judge_calibrate import judge_calibrate
from abliterator.cli._leak import leak
from abliterator.cli._options import verbosity
from abliterator.cli._pairs import pairs
from abliterator.cli._plan import plan
from abliterator.cli._publish import publish
from abliterator.cli._recipes import recipes
from abliterator.cli._report import report
from abliterator.cli._stages import STAGE_COMMANDS
from abliterator.cli._study import study
from abliterator.cli._survive import survive
from abliterator.cli._sweep import sweep
from abliterator.cli._terminal import echo, fitted, printable
from abliterator.cli._verify import verify
from abliterator.errors import AbliteratorError
from abliterator.processes import ending_by_signal

SECTIONS = {
    "Start": ("demo", "recipes", "init", "plan", "doctor"),
    "Run": ("build", "sweep", "study", "bake", "pairs", "judge-calibrate"),
    "Stages of a build": ("directions", "rollouts", "judge", "benchmarks", "card"),
    "Inspect": ("chat", "report", "compare", "survive", "verify", "leak"),
    "Publish": ("publish", "control-vector"),
}


class Group(click.Group):
    """Turns named errors into one paragraph and exit code 1; all else keeps its traceback."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the commands in sections; those that no section names come last."""
        named = {"push", *(name for names in SECTIONS.values() for name in names)}
        others = tuple(name for name in self.list_commands(ctx) if name not in named)
        limit = formatter.width - 6 - max(map(len, self.commands))
        for title, names in (*SECTIONS.items(), ("More", others)):
            commands = [(name, self.commands[name]) for name in names if name in self.commands]
            if commands:
                with formatter.section(title):
                    formatter.write_dl([(n, c.get_short_help_str(limit)) for n, c in commands])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the command line; characters that the output cannot encode are escaped."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        # the last collection of a process that imported torch takes a second, and frees nothing
        # that the system does not: it is to find no objects
        atexit.unregister(gc.freeze)
        atexit.register(gc.freeze)
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            with ending_by_signal():
                return super().invoke(ctx)
        except click.ClickException as error:  # click itself prints it, and it quotes arguments
            vars(error)["message"] = printable(error.message)
            line = fitted(f"Error: {error.format_message()}", err=True, indent=0)
            vars(error)["format_message"] = lambda: line.removeprefix("Error: ")
            raise
        except AbliteratorError as error:
            echo(fitted(f"{type(error).__name__}: {error}", err=True, indent=0), err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                click.echo("\r\x1b[K", err=True, nl=False)  # the terminal's ^C behind a bar
            echo("Interrupted. The same command goes on where this one stopped.", err=True)
            ctx.exit(130)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="abliterator")
@verbosity
@click.pass_context
def main(context: click.Context, /) -> None:
    """Remove the directions of one behaviour from a language model, and measure what that did.

    Start with `abliterator demo`. Names are completed in bash after `eval
    "$(_ABLITERATOR_COMPLETE=bash_source abliterator)"`; zsh and fish have zsh_source and
    fish_source.
    """
    if os.environ.get("NO_COLOR"):
        context.color = False


COMMANDS = (
    bake,
    build,
    chat,
    compare,
    control_vector,
    demo,
    doctor,
    init,
    judge_calibrate,
    leak,
    pairs,
    plan,
    publish,
    recipes,
    report,
    study,
    survive,
    sweep,
    verify,
)

for command in (*COMMANDS, *STAGE_COMMANDS):
    main.add_command(command)
main.add_command(publish, name="push")
