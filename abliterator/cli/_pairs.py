"""`abliterator pairs`: contrast pairs, made with a model behind a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from abliterator.cli._options import FILE, JSON, NEW_FILE, SET
from abliterator.cli._terminal import Bars, render, show

if TYPE_CHECKING:
    from abliterator.pairs import Length


@click.command(short_help="Make pairs of requests with an LLM.")
@click.argument("spec", type=FILE)
@click.option(
    "--out",
    required=True,
    type=NEW_FILE,
    help="File to write (.jsonl). Replies are kept beside it, under the same name, as .sqlite.",
)
@SET
@JSON
def pairs(spec: Path, out: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Make pairs of requests that differ in one behaviour, with a model behind a server.

    SPEC is a yaml file: the behaviour, the two sides, categories, how many, and the server. A run
    that was stopped goes on where it was, with the same command. A recipe takes the file as
    `target: {path: FILE, where: {side: target}}`, and its contrast alike.
    """
    from abliterator.pairs import cache_beside, make_pairs, require_ours, save_pairs
    from abliterator.recipe import load_pairs
    from abliterator.server import warn_of_plain_http

    settings = load_pairs(spec, overrides=overrides)
    server = settings.server
    if warning := warn_of_plain_http(server.base_url, server.api_key_env, name="server.base_url"):
        Bars().note(warning)
    require_ours(out, settings)
    length = _length(settings.tokenizer)
    with Bars().bar("pairs", settings.per_category * len(settings.categories)) as advance:
        pairs_made = make_pairs(
            settings,
            cache=cache_beside(out),
            length=length,
            on_kept=lambda new, spent: advance(new, status=spent),
        )
    save_pairs(out, pairs_made, settings, length)
    counts = {name: len(of_side) for name, of_side in pairs_made.pairs.items()}
    show(
        {**pairs_made._asdict(), "pairs": counts},
        lambda made: render("pairs", made=made, counts=counts, out=out, unit=length.unit),
        as_json=as_json,
    )


def _length(tokenizer: str | None) -> Length:
    from abliterator.pairs import WORDS, Length

    if tokenizer is None:
        return WORDS
    from abliterator.model import load_tokenizer
    from abliterator.source import tokenizer_folder

    loaded = load_tokenizer(tokenizer_folder(tokenizer))
    return Length("tokens", lambda text: len(loaded.encode(text, add_special_tokens=False)))
