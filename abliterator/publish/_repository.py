"""Requests to one repository on the Hub, repeated while the Hub is busy."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeVar

from abliterator.errors import PublishError
from abliterator.publish._refused import Refusal, explain, failures

if TYPE_CHECKING:
    from huggingface_hub import GitRefs, HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

Result = TypeVar("Result")

ATTEMPTS = 4
OF_THE_HUB = frozenset({".gitattributes"})
"""Files that every new repository has."""


class Repository:
    """Requests to one repository; `id` may lack the namespace until the user is known."""

    def __init__(self, repo_id: str, note: Callable[[str], None]) -> None:
        from huggingface_hub import HfApi

        self.id, self.note = repo_id, note
        self.api: HfApi = HfApi(library_name="abliterator", library_version=version("abliterator"))

    def ask(self, purpose: str, call: Callable[[], Result]) -> Result:
        """The result of a request, which is repeated while the Hub is busy or out of reach.

        Args:
            purpose: of the request, for messages: "list the files".
            call: makes the request.

        Raises:
            PublishError: if the Hub refuses, or stays out of reach.
        """
        refusal = Refusal("nothing was asked", None)
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except failures() as error:
                refusal = explain(error, attempt)
            if refusal.wait is None or attempt == ATTEMPTS - 1:
                break
            self.note(f"the Hub is busy or away: again in {refusal.wait:.0f} s")
            time.sleep(refusal.wait)
        # raised here, outside the clause, so that no request with its headers is chained to it
        raise PublishError(f"Could not {purpose} ({self.id}): {refusal.problem}.")

    def info(self) -> ModelInfo:
        """The repository's settings, and the head of its main branch."""
        return self.ask("look at the repository", lambda: self.api.model_info(self.id))

    def head(self, branch: str) -> str | None:
        """The newest commit of a branch; None if the repository has no commit."""
        commit: str | None = self.ask(
            "look at the branch", lambda: self.api.model_info(self.id, revision=branch).sha
        )
        return commit

    def refs(self) -> GitRefs:
        """Branches and tags."""
        return self.ask("look at its branches", lambda: self.api.list_repo_refs(self.id))

    def tree(self, revision: str) -> dict[str, RepoFile]:
        """The files of a branch, tag or commit, by path."""
        from huggingface_hub.hf_api import RepoFile

        def walk() -> dict[str, RepoFile]:
            entries = self.api.list_repo_tree(self.id, recursive=True, revision=revision)
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

        return self.ask("list the files", walk)
