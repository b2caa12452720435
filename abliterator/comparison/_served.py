"""The sides of a comparison whose answers come from a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from abliterator.checkpoint import fingerprint
from abliterator.comparison._beside import Setup
from abliterator.diagnostics import VllmInstall
from abliterator.engines import (
    CompletionClient,
    Engine,
    Served,
    ServedByName,
    ServedEngine,
    VllmCheckpoint,
    VllmModel,
)
from abliterator.errors import BenchmarkError
from abliterator.files import digest_of
from abliterator.recipe import EngineSettings
from abliterator.record import EngineIdentity, Side


@dataclass
class ServedSides:
    """Both sides, as a server serves them, or as vLLM does that is started for one at a time.

    Attributes:
        setups: both checkpoints.
        settings: of the engine.
        cache: file of answers.
        vllm: what runs vLLM, where that is the engine.
        dtype: of vLLM's computation, where the engine's settings leave it open.
        scratch: folder of vLLM's log.
        note: shows a line to the user.
        identities: what answered, by side, as far as it was probed.
    """

    setups: tuple[Setup, Setup]
    settings: EngineSettings
    cache: Path
    vllm: VllmInstall | None
    dtype: str | None
    scratch: Path
    note: Callable[[str], None]
    identities: dict[str, EngineIdentity] = field(default_factory=dict)
    _engines: dict[Side, ServedEngine] = field(default_factory=dict)

    def engine(self, side: Side, *, prompts_of: Side, passes: Callable[[], Engine]) -> ServedEngine:
        """The engine of a side; no weights are loaded until it has to pass tokens through them.

        Args:
            side: whose answers.
            prompts_of: the side whose tokenizer and template its prompts are rendered with.
            passes: returns the engine of all but answers.
        """
        from abliterator.model import load_tokenizer

        self.close(but=side)
        if side not in self._engines:
            tokenizer = load_tokenizer(self._setup(prompts_of).folder)
            base = side if self.vllm else self._setup("base").folder.name
            server = self.settings.server(side, model=base)
            client = CompletionClient(server, tokenizer, cache=self.cache)
            folder = self._setup(side).folder
            self._engines[side] = ServedEngine(
                folder, tokenizer, self._served(side, client), passes, note=self.note
            )
        return self._engines[side]

    def probe(self, side: Side, engine: ServedEngine, prompt: Sequence[int], tokens: int) -> None:
        """Checks what answers for a side, once; `prompt` is the longest, `tokens` of its answer."""
        if side in self.identities:
            return
        section = self.settings
        if isinstance(engine.served, VllmModel):
            engine.served.start()
            section = section.model_copy(update={"dtype": engine.served.dtype or "auto"})
        self.identities[side] = engine.probed(prompt, max_new_tokens=tokens).identity(section)

    @contextmanager
    def serving(self, side: Side, *, passes: Callable[[], Engine]) -> Iterator[str | None]:
        """The address of the vLLM of a side; None where another server has both."""
        served = self.engine(side, prompts_of=side, passes=passes).served
        if not isinstance(served, VllmModel):
            yield None
            return
        try:
            yield served.base_url
        except BenchmarkError:
            served.require_running()
            raise

    def close(self, *, but: Side | None = None) -> None:
        """Ends the vLLM of each side but one; asking it starts it again."""
        for side, engine in self._engines.items():
            if side != but and isinstance(engine.served, VllmModel):
                engine.served.close()

    def _setup(self, side: Side) -> Setup:
        return self.setups[0 if side == "base" else 1]

    def _served(self, side: Side, client: CompletionClient) -> Served:
        files, server = fingerprint(self._setup(side).checkpoint), client.settings
        if self.vllm is None:
            return ServedByName(client, server.model, digest_of([files, server.base_url]))
        depends = [self.vllm.version, self.dtype, self.settings.affecting_answers()]
        return VllmModel(
            self.vllm,
            VllmCheckpoint(self._setup(side).folder, side, self.dtype),
            self.settings,
            digest_of([files, *depends]),
            client,
            log=self.scratch / "vllm.log",
            scratch=self.scratch / "vllm",
            note=self.note,
        )
