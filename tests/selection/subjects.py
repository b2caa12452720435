"""A tiny model as the subject of a selection, asked one list of prompts throughout."""

from abliterator.anatomy import anatomy_of
from abliterator.bake import EditSettings, plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.judge import RuleJudge
from abliterator.model import block_paths
from abliterator.selection import Asked, Subject


def subject_of(loaded, prompts, *, max_new_tokens, max_batch_tokens) -> Subject:
    checkpoint = Checkpoint.open(loaded.folder)
    anatomy = anatomy_of(checkpoint.config)
    asked = Asked([f"prompt {i}" for i in range(len(prompts))], prompts)
    return Subject(
        loaded=loaded,
        plan=plan_edits(checkpoint, anatomy, EditSettings()),
        blocks=block_paths(anatomy.blocks, anatomy.n_layers),
        target=asked,
        contrast=asked,
        neutral=asked,
        held_out=asked,
        judge=RuleJudge(),
        max_new_tokens=max_new_tokens,
        batch_size=4,
        max_batch_tokens=max_batch_tokens,
    )
