"""The engines that answer for the models of a run, as the recipe's `engine` says.

`Run.answering` is the one place that chooses; `probe_engines` checks servers before anything waits
for them, and says what answered, for the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.files import digest_of
from abliterator.pipeline._run import Run
from abliterator.pipeline.stages.prompts import prompt_sets
from abliterator.record import EngineIdentity, Side

if TYPE_CHECKING:
    from abliterator.engines import Engine, Probed, ServedEngine


def served_engine(run: Run, folder: Path, side: Side) -> ServedEngine:
    """The engine of a side whose answers come from the recipe's server."""
    from abliterator.engines import CompletionClient, ServedByName, ServedEngine
    from abliterator.model import load_tokenizer
    from abliterator.server import warn_of_plain_http

    settings = run.recipe.engine.server(side, model=run.recipe.model)
    if warning := warn_of_plain_http(
        settings.base_url, settings.api_key_env, name=settings.url_key
    ):
        run.progress.note(warning)
    trusted = run.recipe.trust_remote_code
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    client = CompletionClient(settings, tokenizer, cache=run.workspace.work / "answers.sqlite")
    bake = run.digest("bake") if side == "edited" else None
    identity = digest_of([run.base_digest(), bake, settings.base_url])
    return ServedEngine(
        folder,
        tokenizer,
        ServedByName(client, settings.model, identity),
        passes=lambda: run.engine(folder),
        trust_remote_code=trusted,
        note=run.progress.note,
    )


def probe_engines(run: Run, folders: dict[Side, Path]) -> dict[Side, EngineIdentity]:
    """What answers for each side, after checking it; nothing where this process does.

    Args:
        run: the run.
        folders: the checkpoint of each side that is to be answered for.

    Raises:
        ServerError: if a server cannot be used, or serves another model.
    """
    from abliterator.engines import ServedEngine, VllmModel, require_two_models

    probed: dict[Side, Probed] = {}
    identities: dict[Side, EngineIdentity] = {}
    for side, folder in folders.items():
        engine = run.answering(folder, side)
        if not isinstance(engine, ServedEngine):
            return {}
        if isinstance(engine.served, VllmModel):
            engine.served.start()
        prompt = _longest_prompt(run, engine)
        probed[side] = engine.probed(prompt, max_new_tokens=run.recipe.rollouts.most_tokens)
        _note_other_tokens(run, engine, prompt, probed[side].tokens)
        section = run.recipe.engine
        if isinstance(engine.served, VllmModel):
            section = section.model_copy(update={"dtype": engine.served.dtype or "auto"})
        identities[side] = probed[side].identity(section)
    if "base" in probed and "edited" in probed:
        require_two_models(probed["base"], probed["edited"])
    return identities


def _longest_prompt(run: Run, engine: Engine) -> Sequence[int]:
    settings = run.recipe.rollouts
    return max(
        (
            ids
            for name, prompts in prompt_sets(run).evaluation.items()
            for ids in run.render(
                engine,
                prompts.prompts[: settings.limit],
                name=name,
                max_new_tokens=settings.max_new_tokens,
            ).token_ids
        ),
        key=len,
    )


def _note_other_tokens(
    run: Run, engine: ServedEngine, prompt: Sequence[int], tokens: Sequence[int]
) -> None:
    """Notes first tokens that differ from this process's, if it holds the model already."""
    from abliterator.engines import TransformersEngine

    loaded = run.held(engine.folder)
    if loaded is None or not tokens:
        return
    own = TransformersEngine(loaded).answers([prompt], max_new_tokens=len(tokens), batch_size=1)
    if own[0].token_ids[:1] not in ((), tuple(tokens[:1])):
        run.progress.note(
            f"The server's answer begins with {engine.tokenizer.decode(tokens)!r}, and this "
            f"process's with {own[0].text!r}. Check that it serves this model: of two dtypes, "
            "such differences are rare."
        )
