"""A chat with base and edited, rendered as the prompts that were measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from abliterator.checkpoint import Checkpoint
from abliterator.devices import enough_memory
from abliterator.errors import OutputError, RecipeError
from abliterator.pipeline._options import Options
from abliterator.pipeline._planning._plan import make_plan
from abliterator.pipeline._run import Run
from abliterator.pipeline._workspace import Workspace
from abliterator.pipeline.stages.directions import removed_subspace
from abliterator.pipeline.stages.rollouts import folder_of
from abliterator.pipeline.stages.tuning import planned_edits
from abliterator.recipe import Chat, Recipe, load_recipe
from abliterator.record import Side
from abliterator.source import RECIPE, resolve_folder

if TYPE_CHECKING:
    from abliterator.engines import TransformersEngine

Turns = Sequence[tuple[str, str]]
# a side's model, and the context of the edit under which it answers
ModelOfSide: TypeAlias = "tuple[TransformersEngine, Callable[[], AbstractContextManager[None]]]"


@dataclass(frozen=True)
class ChatSession:
    """One side or both, loaded, with the recipe's chat.

    Attributes:
        models: by side.
        chat: how a prompt becomes a conversation.
        max_new_tokens: of an answer.
        edited_at: the context of the edit at a factor of its strengths; None where the edit has no
            run-time form, or its base is not loaded.
        notes: what differs between the two folders beside their weights, since each model uses its
            own chat template and tokenizer.
    """

    models: dict[Side, ModelOfSide]
    chat: Chat
    max_new_tokens: int
    notes: tuple[str, ...] = ()
    edited_at: Callable[[float], AbstractContextManager[None]] | None = None

    def set_strength(self, factor: float) -> None:
        """Lets the edited side answer at `factor` of the strengths that were built.

        Raises:
            RecipeError: if the edit is not made at run time here.
        """
        if self.edited_at is None:
            raise RecipeError(
                "The strength can be changed in a chat with the folder of a build whose edit has "
                "`norm: none`, and this is none."
            )
        engine, _ = self.models["edited"]
        self.models["edited"] = engine, partial(self.edited_at, factor)

    def answer(
        self,
        side: Side,
        prompt: str,
        before: Turns,
        on_text: Callable[[str], None],
        on_answer: Callable[[str], None] = lambda answer: None,
    ) -> None:
        """Answers greedily, with the stop tokens that measurements have.

        Args:
            side: which model answers.
            prompt: the new turn.
            before: earlier turns of this side, each with its answer and without its thinking.
            on_text: called with the answer piece by piece, thinking included; the answer ends where
                the model's context does.
            on_answer: called with the answer without its thinking, as a later turn repeats it; also
                when Ctrl-C stopped it.

        Raises:
            PromptError: for a conversation that is longer than what the model reads.
            GenerationError: for one that does not fit in the device's memory.
        """
        from abliterator.model import render_prompts

        engine, edit = self.models[side]
        (ids,) = render_prompts(
            engine.tokenizer,
            [prompt],
            engine.limits,
            name="chat",
            max_new_tokens=1,
            system=self.chat.system,
            template_kwargs=self.chat.template_kwargs,
            before=before,
        )
        context = engine.limits.context
        tokens_left = self.max_new_tokens if context is None else context - len(ids)
        with edit(), enough_memory("The conversation", smaller="a shorter conversation"):
            engine.stream(
                ids,
                max_new_tokens=min(self.max_new_tokens, tokens_left),
                on_text=on_text,
                on_end=lambda answer: on_answer(answer.text[answer.start :].strip()),
            )


def open_chat(
    name: str,
    *,
    sides: Sequence[Side],
    max_new_tokens: int | None,
    options: Options,
    at_run_time: bool = False,
) -> ChatSession:
    """Loads the models of a chat.

    For both sides of a build, the base is loaded once and the edit is switched on and off at run
    time, which is equal to the baked weights up to rounding. An edit that has no such
    form, or a checkpoint without its build, takes two models in memory.

    Args:
        name: the folder of a build, a checkpoint, or a Hub id.
        sides: which models answer.
        max_new_tokens: of an answer; None for the recipe's, 256 where there is no recipe.
        options: device and dtype.
        at_run_time: for a build, load the base alone and edit it at run time, where that can be
            done: then both sides can answer, and the strength can be changed.

    Raises:
        RecipeError: if the base is asked for and the checkpoint does not say which it is, and for
            a device that this machine does not have.
        OutputError: if the build was not finished.
    """
    recipe: Recipe | None
    _ = options.compute_device  # one that is not there is an error before anything is downloaded
    edited_at: Callable[[float], AbstractContextManager[None]] | None = None
    workspace = Workspace(Path(name))
    if workspace.is_ours:
        recipe = workspace.recipe()
        if workspace.marker("config") is None:
            raise OutputError(
                f"{workspace.out} has no edited checkpoint yet. Go on with `abliterator build`."
            )
        source = resolve_folder(recipe.model, revision=recipe.revision)
        plan = make_plan(source, recipe.edit, workspace.out)
        run = Run(recipe, plan, workspace, options)
        if at_run_time and recipe.edit.norm == "none":
            sides = ("base", "edited")
        models = _models_of_build(run, sides)
        if len(sides) > 1 and recipe.edit.norm == "none":
            edited_at = partial(_edited_at, run, models["edited"][0])
    else:
        folder = resolve_folder(name, revision=None).folder
        recipe = load_recipe(folder / RECIPE) if (folder / RECIPE).is_file() else None
        models = {side: (_load(folder, side, recipe, options), nullcontext) for side in sides}
    tokens = max_new_tokens or (recipe.rollouts.most_tokens if recipe else 256)
    chat = recipe.chat if recipe else Chat()
    return ChatSession(models, chat, tokens, _notes(models), edited_at)


def _edited_at(run: Run, engine: TransformersEngine, factor: float) -> AbstractContextManager[None]:
    """The model under the build's edit at `factor` of its strengths."""
    from abliterator.engines import WriterEdit

    plan = planned_edits(run)
    strengths = {edit.writer.module: factor * edit.strength for edit in plan.edits}
    return engine.edited(WriterEdit(plan, removed_subspace(run).basis, strengths))


def _notes(models: dict[Side, ModelOfSide]) -> tuple[str, ...]:
    folders = {side: engine.loaded.folder for side, (engine, _) in models.items()}
    if len(set(folders.values())) < 2:
        return ()
    from abliterator.comparison import difference_line, differences_beside

    differing = differences_beside(folders["base"], folders["edited"])
    return tuple(f"beside the weights: {difference_line(difference)}" for difference in differing)


def _models_of_build(run: Run, sides: Sequence[Side]) -> dict[Side, ModelOfSide]:
    from abliterator.engines import TransformersEngine, WriterEdit

    if len(sides) > 1 and run.recipe.edit.norm == "none":
        engine = TransformersEngine(run.loaded(run.plan.source.folder))
        edit = WriterEdit(planned_edits(run), removed_subspace(run).basis)
        edited = partial(engine.edited, edit)
        return {side: (engine, edited if side == "edited" else nullcontext) for side in sides}
    trusted = run.recipe.trust_remote_code
    return {
        side: (_engine(folder_of(run, side), run.options, run.dtype, trusted), nullcontext)
        for side in sides
    }


def _engine(folder: Path, options: Options, dtype: str | None, trusted: bool) -> TransformersEngine:
    from abliterator.engines import TransformersEngine
    from abliterator.model import load_model

    loaded = load_model(folder, **options.weights, dtype=dtype, trust_remote_code=trusted)
    return TransformersEngine(loaded)


def _load(folder: Path, side: Side, recipe: Recipe | None, options: Options) -> TransformersEngine:
    """A checkpoint, or the base that its recipe names."""
    if side == "base":
        if recipe is None:
            raise RecipeError(
                f"{folder.name} has no {RECIPE} that would say which model is its base. Leave out "
                "`--base` and `--compare`, or give the folder of a build."
            )
        folder = resolve_folder(recipe.model, revision=recipe.revision).folder
    return _engine(
        folder,
        options,
        options.compute_dtype(Checkpoint.open(folder)),
        recipe is not None and recipe.trust_remote_code,
    )
