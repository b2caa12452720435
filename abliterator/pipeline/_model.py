"""A model to work with in a notebook: directions, a heatmap, a preview, an edited checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

from abliterator.errors import DirectionError
from abliterator.files import write_bytes_atomic
from abliterator.pipeline._bake_subspace import bake_subspace
from abliterator.pipeline._options import Options
from abliterator.pipeline._planning._plan import make_plan
from abliterator.recipe import Edit, Source
from abliterator.record import TensorEdit
from abliterator.source import resolve_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from abliterator.directions import Directions, Position, Subspace
    from abliterator.engines import TransformersEngine
    from abliterator.prompts import Prompt

# Texts or conversations, or a .txt or .jsonl file of them.
Prompts: TypeAlias = "Sequence[Prompt] | Path"


class Model:
    """A model whose directions are looked at, tried out and written into a folder.

    It is loaded when it is first used; its weights never change.

        model = Model("embedded:demo")
        directions = model.directions(Path("target.jsonl"), Path("contrast.jsonl"))
        model.heatmap(directions)
        subspace = model.subspace(directions, layers=[4])
        with model.preview(subspace):
            model.answers(["What does Neva cook for supper?"])
        model.bake(subspace, "out/edited")

    Args:
        name: a Hub id, a folder, or "embedded:demo".
        revision: branch, tag or commit on the Hub.
        device: as `pipeline.Options` has it.
        dtype: the same.
        system: system prompt of every chat.
        trust_remote_code: whether to run Python files of the model.

    Raises:
        CheckpointError: if there is no such model.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        system: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.source = resolve_folder(str(name), revision=revision)
        self._options = Options(device, dtype)
        self._system = system
        self._trust_remote_code = trust_remote_code

    def directions(
        self,
        target: Prompts,
        contrast: Prompts,
        *,
        position: Position = -1,
        estimator: str = "mean_difference",
    ) -> Directions:
        """The direction between two prompt sets, at every layer: the difference of their means.

        Args:
            target: prompts on which the behaviour shows.
            contrast: prompts as like them as possible on which it does not.
            position: token of the prompt, from its end; or "instruction", the last of its own text.
            estimator: another of `abliterator.directions.ESTIMATORS`, as docs/methods.md has them.

        Returns:
            `vectors` [n_layers, d_model] float64; row l - 1 is that of residual layer l.

        Raises:
            PromptError: for a file that cannot be read, or a prompt that is too long.
            DirectionError: for a position or an estimator that is none.
        """
        from abliterator.capture import capture, capture_vectors
        from abliterator.directions import Observations, estimate, estimator_of

        sets = [
            self._located(name, prompts, position)
            for name, prompts in (("target", target), ("contrast", contrast))
        ]
        if estimator_of(estimator).needs_vectors:
            vectors = (capture_vectors(self._engine, ids, position=at) for ids, at in sets)
            observed = Observations.of_vectors(*vectors)
        else:
            moments = [capture(self._engine, ids, position=at) for ids, at in sets]
            observed = Observations(target=moments[0], contrast=moments[1])
        return estimate(estimator, observed)

    def heatmap(self, directions: Directions) -> Figure:
        """The cosines between the directions of all layers, as a figure of matplotlib."""
        import torch

        from abliterator.plots import cosines_figure

        unit = torch.nn.functional.normalize(directions.vectors, dim=1)
        return cosines_figure((unit @ unit.T).tolist(), range(1, len(unit) + 1))

    def subspace(self, directions: Directions, layers: Sequence[int]) -> Subspace:
        """The subspace that the directions of some layers span.

        Raises:
            DirectionError: if one has no length or depends on those before it.
        """
        from abliterator.directions import stack

        return stack(directions, layers)

    @contextmanager
    def preview(self, subspace: Subspace, *, edit: Edit | None = None) -> Iterator[None]:
        """Lets the model answer under an edit, as long as the context is open.

        Args:
            subspace: what is removed.
            edit: how, as a recipe has it; by default strength 1 on every writer.

        Raises:
            RecipeError: for an edit that hooks cannot make, such as `norm: column`.
        """
        from abliterator.engines import WriterEdit

        plan = make_plan(self.source, edit or Edit(), Path()).edits
        with self._engine.edited(WriterEdit(plan, subspace.basis)):
            yield

    def answers(self, prompts: Prompts, *, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers, one a prompt, without what the model thought before them."""
        token_ids = self._rendered("prompts", prompts, max_new_tokens=max_new_tokens)
        answers = self._engine.answers(token_ids, max_new_tokens=max_new_tokens)
        return [answer.text[answer.start :] for answer in answers]

    def bake(
        self, subspace: Subspace, out: str | Path, *, edit: Edit | None = None
    ) -> tuple[TensorEdit, ...]:
        """Writes the edited checkpoint to `out`, a new or empty folder; returns the edited tensors.

        Raises:
            AbliteratorError: as `bake_subspace`.
        """
        from safetensors.torch import save

        with TemporaryDirectory(prefix="abliterator-") as folder:
            file = Path(folder) / "subspace.safetensors"
            write_bytes_atomic(file, save({"subspace": subspace.basis.contiguous()}))
            return bake_subspace(str(self.source.folder), file, Path(out), edit=edit)

    def _located(
        self, name: str, prompts: Prompts, position: Position
    ) -> tuple[list[list[int]], int]:
        """Token ids of the prompts, and where in them the position is, from their end."""
        from abliterator.model import up_to_instruction

        texts, engine = self._texts(name, prompts), self._engine
        token_ids = self._rendered(name, texts)
        if isinstance(position, int):
            return token_ids, position
        if position != "instruction":
            raise DirectionError(
                f'{position!r} is no position here. Give a number below 0, or "instruction".'
            )
        return up_to_instruction(engine.tokenizer, texts, system=self._system), -1

    def _texts(self, name: str, prompts: Prompts) -> Sequence[Prompt]:
        from abliterator.prompts import load_prompts

        if isinstance(prompts, Path):
            return load_prompts(name, Source(path=prompts)).prompts
        return prompts

    def _rendered(self, name: str, prompts: Prompts, **limits: Any) -> list[list[int]]:
        from abliterator.model import render_prompts

        prompts, engine = self._texts(name, prompts), self._engine
        return render_prompts(
            engine.tokenizer, prompts, engine.limits, name=name, system=self._system, **limits
        )

    @cached_property
    def _engine(self) -> TransformersEngine:
        from abliterator.checkpoint import Checkpoint
        from abliterator.engines import TransformersEngine
        from abliterator.model import load_model

        return TransformersEngine(
            load_model(
                self.source.folder,
                **self._options.weights,
                dtype=self._options.compute_dtype(Checkpoint.open(self.source.folder)),
                trust_remote_code=self._trust_remote_code,
            )
        )
