"""Renders one chat template; run by a fresh interpreter, without abliterator.

usage: python _template_child.py BYTES     # a JSON object on stdin, the text on stdout

A template is a program that came with a model. `_template_tokens` bounds its time, and here its
memory is bounded on Linux.
"""

from __future__ import annotations

import json
import sys


def main(memory: int) -> None:
    """Writes the text that the template makes of the messages."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    request = json.load(sys.stdin)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"],
    )
    environment.filters["tojson"] = json.dumps
    environment.globals["strftime_now"] = lambda form: "01 Jan 2000"
    template = environment.from_string(request["template"])
    text = template.render(request["variables"], messages=request["messages"])
    sys.stdout.buffer.write(text[:1_000_000].encode("utf-8", "replace"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
