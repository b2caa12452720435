"""A branch on the Hub that marks the last commit before those whose contents are unproven.

It is created before a commit, and deleted when the commit's contents were read back. While it
exists, however the run ended that created it, the commits after it are not proven, and the
repository is not made public. Where the branch was empty before them, its history is squashed.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from abliterator.errors import PublishError
from abliterator.publish._refused import failures
from abliterator.publish._repository import OF_THE_HUB, Repository

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

MARK = "abliterator-unverified"


class Mark:
    """The mark of one branch of one repository."""

    def __init__(self, repo: Repository, branch: str) -> None:
        self._repo, self._branch = repo, branch
        self._name = MARK if branch == "main" else f"{MARK}-{branch}"

    def place(self, head: str) -> None:
        """Marks the commit after which contents are unproven until `clear`; an older mark stays.

        Raises:
            PublishError: if the Hub does not make the branch.
        """
        repo = self._repo
        repo.ask(
            "mark where the upload begins",
            lambda: repo.api.create_branch(
                repo.id, branch=self._name, revision=head, exist_ok=True
            ),
        )
        if self._marked() is None:
            raise PublishError(
                f"Could not mark where the upload begins: the Hub has made no branch {self._name} "
                f"in {repo.id}. Nothing was committed. Run the same command again."
            )

    def clear(self, commit: str, differing: Callable[[str], list[str]], *, strict: bool) -> str:
        """Deletes the mark once no unproven commit is left, and returns the proven commit.

        Args:
            commit: the newest of the branch, whose contents were read back.
            differing: which planned files of a commit are not as planned.
            strict: whether the repository is to be public.

        Returns:
            `commit`, or the commit that replaced it when the history was squashed.

        Raises:
            PublishError: if unproven commits stay though the repository is to be public.
        """
        marked_commit = self._marked()
        if marked_commit is not None:
            unproven = self._commits_since(marked_commit) - {commit}
            if unproven and not self._was_empty(marked_commit):
                self._report(self._kept_in_history(unproven), strict=strict)
                return commit
            if unproven:
                commit = self._squash()
                if differing_paths := differing(commit):
                    raise PublishError(
                        f"{', '.join(differing_paths[:3])} of {self._repo.id} changed when its "
                        "history was squashed. It was not made public. Run the same command again."
                    )
            self._delete()
        if other_marks := [name for name in self._marks() if name != self._name]:
            self._report(
                f"{self._repo.id} has the branch {other_marks[0]}, by which an earlier upload to "
                "another branch marked commits that were not proven. It was not made public. "
                "Publish to that branch again; or delete it, and the mark.",
                strict=strict,
            )
        return commit

    def withdraw(self, commit: str, planned: Collection[str]) -> str:
        """Removes a commit with wrong contents from the history, and returns a sentence about it.

        Where the branch had contents before, they would be removed too: then commit and mark stay.

        Args:
            commit: the newest of the branch.
            planned: paths that were to be committed.
        """
        try:
            marked_commit = self._marked()
            if marked_commit is None:
                return "Close the pull request."
            if not self._was_empty(marked_commit):
                return self._kept_in_history({commit})
            self._delete_files(commit, planned)
            self._squash()
            self._delete()
        except PublishError as error:
            return f"It is still in the history, which the next run mends. {error}"
        return "It was taken out of the history."

    def _report(self, problem: str, *, strict: bool) -> None:
        if strict:
            raise PublishError(problem)
        self._repo.note(problem)

    def _kept_in_history(self, unproven: Collection[str]) -> str:
        commits = ", ".join(sorted(commit[:12] for commit in unproven))
        return (
            f"The history of {self._repo.id} keeps a commit whose contents were not proven "
            f"({commits}), for older ones before it would go with it; so --public is refused. "
            "Keep it private, or, when the contents are right, drop the history with "
            f"HfApi().super_squash_history({self._repo.id!r}, branch={self._branch!r}) of "
            "huggingface_hub, and run the same command again."
        )

    def _marks(self) -> dict[str, str]:
        """The commit of every mark, by the branch that is the mark."""
        branches = self._repo.refs().branches
        return {ref.name: ref.target_commit for ref in branches if ref.name.startswith(MARK)}

    def _marked(self) -> str | None:
        return self._marks().get(self._name)

    def _commits_since(self, marked_commit: str) -> set[str]:
        """The commits of the branch after the marked one; all of them if it is not there."""
        repo = self._repo
        commits = repo.ask(
            "list the commits",
            lambda: repo.api.list_repo_commits(repo.id, revision=self._branch),
        )
        return set(takewhile(lambda name: name != marked_commit, (c.commit_id for c in commits)))

    def _was_empty(self, marked_commit: str) -> bool:
        return not self._repo.tree(marked_commit).keys() - OF_THE_HUB

    def _delete_files(self, commit: str, planned: Collection[str]) -> None:
        """Commits the deletion of all planned files; large ones stay stored for the next run."""
        from huggingface_hub import CommitOperationDelete

        repo = self._repo
        paths = sorted(repo.tree(commit).keys() & set(planned))
        repo.ask(
            "take out what is wrong",
            lambda: repo.api.create_commit(
                repo.id,
                [CommitOperationDelete(path) for path in paths],
                commit_message="Take out what did not arrive as it was sent",
                revision=self._branch,
            ),
        )

    def _squash(self) -> str:
        """Replaces the branch's history by one commit, which is returned."""
        repo = self._repo
        repo.note("taking unproven commits out of the history")
        repo.ask(
            "squash the history",
            lambda: repo.api.super_squash_history(
                repo.id, branch=self._branch, commit_message="Upload by abliterator"
            ),
        )
        head = repo.head(self._branch)
        if head is None:
            raise PublishError(f"{repo.id} has no commit. Run the same command again.")
        return head

    def _delete(self) -> None:
        repo = self._repo

        def delete() -> None:
            try:
                repo.api.delete_branch(repo.id, branch=self._name)
            except failures():
                if self._marked() is not None:  # a lost response may have been a success
                    raise

        repo.ask("take the mark away", delete)
