"""The README of a checkpoint or an adapter, rendered from the record of its run.

`template.md.jinja` is the card as a reader sees it; the private modules make its table rows and
the paragraphs that depend on the record. `render_card` is a pure function: the record in, the text
out, without network, model or clock. What was not measured says so. A record holds no prompt and no
answer, so a card cannot show one.

Every string that the template prints is escaped unless it is `Markdown`, which only this package
makes: an id, a licence or a path can break neither a table nor the header, and a new line of the
template cannot forget to escape.

    (checkpoint / "README.md").write_text(render_card(record), encoding="utf-8")
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from abliterator.card._edit import edit_variables
from abliterator.card._header import header
from abliterator.card._licences import stated_license, with_license
from abliterator.card._markdown import Markdown, cell, escape, optional_table, paragraphs, table
from abliterator.card._origins import origin_variables
from abliterator.card._results import result_variables
from abliterator.record import RunRecord

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["escape", "render_adapter_card", "render_card", "stated_license", "with_license"]


def render_card(record: RunRecord) -> str:
    """The Markdown of a checkpoint's card, YAML header included, ending in one newline."""
    return _render(record, adapter=False)


def render_adapter_card(record: RunRecord) -> str:
    """The card of the adapter of the same run: it says that the checkpoint is what was measured."""
    return _render(record, adapter=True)


def _render(record: RunRecord, *, adapter: bool) -> str:
    variables = {
        "header": Markdown(header(record, adapter=adapter)),
        **edit_variables(record, adapter=adapter),
        **result_variables(record),
        **origin_variables(record, adapter=adapter),
    }
    return _template().render(variables).rstrip("\n") + "\n"


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    text = resources.files("abliterator.card").joinpath("template.md.jinja").read_text("utf-8")
    environment = Environment(
        autoescape=False,  # that would be HTML's escape, which is not Markdown's
        finalize=cell,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    for function in (optional_table, paragraphs, table):
        environment.filters[function.__name__] = function
    return environment.from_string(text)
