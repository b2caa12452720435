"""Checks whether an existing repository may be written to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from abliterator.checkpoint import is_opened_by_loaders
from abliterator.errors import PublishError
from abliterator.publish._plan import PublishPlan, Target
from abliterator.publish._repository import OF_THE_HUB, Repository
from abliterator.publish._upload import missing_files
from abliterator.verification import RECORD

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_FILES_SHOWN = 5  # files that a message names


def require_writable(repo: Repository, plan: PublishPlan, info: ModelInfo) -> None:
    """Refuses a repository that is public already, or has files that abliterator did not make.

    Raises:
        PublishError: it says which, and which option allows it.
    """
    target = plan.target
    refs = repo.refs()
    branches = {ref.name for ref in refs.branches} & {"main", target.revision}
    trees = [repo.tree(branch) for branch in sorted(branches)]
    planned = {file.path for file in plan.files}
    foreign_paths = {path for tree in trees if RECORD not in tree for path in tree}
    unexpected = sorted(foreign_paths.union(*trees) - (planned - foreign_paths) - OF_THE_HUB)
    if unexpected and not target.into_existing:
        raise PublishError(
            f"{repo.id} has files that abliterator did not make "
            f"({', '.join(unexpected[:_FILES_SHOWN])}). Nothing was uploaded. Choose another "
            "--repo-id, or give --into-existing: they then stay beside ours, and those of the same "
            "name are replaced."
        )
    loadable = list(filter(is_opened_by_loaders, sorted(set(unexpected) - planned)))
    if loadable:
        raise PublishError(
            f"{repo.id} has files that a loader would open beside ours, or in their place "
            f"({', '.join(loadable[:_FILES_SHOWN])}), so it would load as another model. Nothing "
            "was uploaded. Delete them there, or choose another --repo-id."
        )
    if not info.private:
        _check_public(
            repo, target, would_change=any(missing_files(plan.files, tree) for tree in trees)
        )


def _check_public(repo: Repository, target: Target, *, would_change: bool) -> None:
    """Refuses to write into a public repository without the option that allows it."""
    if not (target.public or target.create_pr):
        raise PublishError(
            f"{repo.id} is public, so whatever is uploaded is seen at once. Nothing was. Give "
            "--public if that is wanted, or choose another --repo-id."
        )
    if would_change and not target.into_existing:
        raise PublishError(
            f"{repo.id} is public and has other contents: new ones would be seen before they are "
            "checked. Nothing was uploaded. Make it private first, or give --into-existing."
        )
