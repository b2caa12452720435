"""The sides of a comparison whose answers come from a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from abliterator.checkpoint import fingerprint
from abliterator.comparison._beside import Setup
from abliterator.engines import CompletionClient, Engine, ServedByName, ServedEngine
from abliterator.files import digest_of
from abliterator.recipe import EngineSettings
from abliterator.record import Side


class ServedSides:
    """Both sides, as a server serves them."""

    def __init__(
        self, setups: tuple[Setup, Setup], settings: EngineSettings, *, cache: Path
    ) -> None:
        self._setups: dict[Side, Setup] = {"base": setups[0], "edited": setups[1]}
        self._settings, self._cache = settings, cache
        self._engines: dict[Side, ServedEngine] = {}

    def engine(self, side: Side, *, prompts_of: Side, passes: Callable[[], Engine]) -> ServedEngine:
        """The engine of a side; no weights are loaded until it has to pass tokens through them.

        Args:
            side: whose answers.
            prompts_of: the side whose tokenizer and template its prompts are rendered with.
            passes: returns the engine of all but answers.
        """
        from abliterator.model import load_tokenizer

        if side not in self._engines:
            setup = self._setups[side]
            base = self._setups["base"].folder
            server = self._settings.server(side, model=base.name)
            tokenizer = load_tokenizer(self._setups[prompts_of].folder)
            client = CompletionClient(server, tokenizer, cache=self._cache)
            identity = digest_of([fingerprint(setup.checkpoint), server.base_url])
            served = ServedByName(client, server.model, identity)
            self._engines[side] = ServedEngine(setup.folder, tokenizer, served, passes)
        return self._engines[side]
