"""The README of a checkpoint or an adapter, rendered from the record of its run.

`template.md.jinja` is the card as a reader sees it, `sections/` has its longer parts, and
`_markdown` what a cell says. `render_card` is a pure function: the record in, the text out, without
network, model or clock. What was not measured says so. A record holds no prompt and no answer, so a
card cannot show one.

Every string that the template prints is escaped unless it is `Markdown`, which only this package
makes: an id, a licence or a path can break neither a table nor the header, and a new line of a
template cannot forget to escape.

    (checkpoint / "README.md").write_text(render_card(record), encoding="utf-8")
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from abliterator.card import _markdown
from abliterator.card._header import stated_license, with_license
from abliterator.card._markdown import cell, escape
from abliterator.card._variables import variables
from abliterator.record import RunRecord

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["escape", "render_adapter_card", "render_card", "stated_license", "with_license"]

_FILTERS = (
    *("estimate", "gain", "interval", "last_name", "listed", "n_of", "number", "or_absent"),
    *("probability", "settings", "two_lines", "uncapitalized", "value"),
)


def render_card(record: RunRecord) -> str:
    """The Markdown of a checkpoint's card, YAML header included, ending in one newline."""
    return _render(record, adapter=False)


def render_adapter_card(record: RunRecord) -> str:
    """The card of the adapter of the same run: it says that the checkpoint is what was measured."""
    return _render(record, adapter=True)


def _render(record: RunRecord, *, adapter: bool) -> str:
    return _template().render(variables(record, adapter=adapter)).rstrip("\n") + "\n"


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("abliterator", "card"),
        autoescape=False,  # that would be HTML's escape, which is not Markdown's
        finalize=cell,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {name: getattr(_markdown, name) for name in _FILTERS}
    return environment.get_template("template.md.jinja")
