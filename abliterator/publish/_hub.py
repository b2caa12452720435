"""The plan, carried out: every request that changes something on the Hub is made here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.checkpoint import is_opened_by_loaders
from abliterator.errors import PublishError
from abliterator.publish._files import PlannedFile, changed, require_unchanged
from abliterator.publish._load import check_loads
from abliterator.publish._mark import Mark
from abliterator.publish._plan import PublishPlan
from abliterator.publish._refused import failures
from abliterator.publish._repository import OF_THE_HUB, Repository
from abliterator.verification import RECORD

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import ModelInfo, RepoFile

_TOLD = 5  # files that a message names


@dataclass(frozen=True)
class Published:
    """What is on the Hub now.

    Attributes:
        url: of the repository, or of the pull request.
        repo_id: with its namespace.
        commit: the commit that has exactly the planned contents, read back.
        uploaded: files that this call sent.
        unchanged: planned files that were there already.
        public: whether anybody can see it.
        gated: "auto", "manual", or False.
    """

    url: str
    repo_id: str
    commit: str
    uploaded: tuple[str, ...]
    unchanged: tuple[str, ...]
    public: bool
    gated: str | bool

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "uploaded": list(self.uploaded), "unchanged": list(self.unchanged)}


def publish(plan: PublishPlan, *, note: Callable[[str], None] = lambda _: None) -> Published:
    """Carries out a plan: private first, one commit, read back, and public last.

    Args:
        plan: from `plan_publish`.
        note: told what is being done, a line at a time.

    Raises:
        PublishError: if what is to be published does not load, or the Hub refuses; what has arrived
            stays private, and the same call goes on from there.
    """
    note(f"loading the {plan.what} offline, in a fresh process")
    check_loads(plan)
    return _Publication(plan, note).run()


class _Publication:
    """One plan on its way to one repository."""

    def __init__(self, plan: PublishPlan, note: Callable[[str], None]) -> None:
        self.plan, self.target, self.note = plan, plan.target, note
        self.repo = Repository(plan.target.repo_id, note)
        self.api = self.repo.api
        self.mark = Mark(self.repo, plan.target.revision)

    def run(self) -> Published:
        """All steps, in the one order that is safe."""
        who = self.repo.ask("ask who you are", self.api.whoami)
        if "/" not in self.repo.id:
            self.repo.id = f"{who['name']}/{self.repo.id}"
        gated = self._wanted_gating()
        info = self._open(gated)
        self._make_branch()
        commit, url, sent = self._upload(info)
        commit = self._read_back(commit)
        if self.target.tag is not None:
            self._tag(self.target.tag, commit)
        if self.target.public and info.private:
            self.note("making it public")
            self.repo.ask("make it public", self._set(private=False))
        after = self.repo.info()
        planned = tuple(file.path for file in self.plan.files)
        unchanged = tuple(path for path in planned if path not in sent)
        return Published(
            url, self.repo.id, commit, sent, unchanged, not after.private, after.gated or False
        )

    def _set(self, **settings: Any) -> Callable[[], None]:
        return lambda: self.api.update_repo_settings(self.repo.id, **settings)

    def _wanted_gating(self) -> str | bool:
        if self.target.gated is not None:
            return False if self.target.gated == "no" else self.target.gated
        base = self.plan.base
        if base is None:
            return False
        info = self.repo.ask(f"ask whether {base} is gated", lambda: self.api.model_info(base))
        return info.gated or False

    def _open(self, gated: str | bool) -> ModelInfo:
        """The repository: made private, or found to be ours."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        def look() -> ModelInfo | None:
            try:
                return self.api.model_info(self.repo.id)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

        def create() -> None:
            if look() is None:  # an answer that was lost may have been a yes
                self.api.create_repo(self.repo.id, private=True)

        info = self.repo.ask("look for the repository", look)
        if info is None:
            self.note(f"creating {self.repo.id}, private")
            self.repo.ask("create the repository", create)
            info = self.repo.info()
            if not info.private:
                raise PublishError(
                    f"{self.repo.id} was asked for as private, but the Hub says it is public. "
                    "Nothing was uploaded. Look at its settings, and at those of your organisation."
                )
        self._check_existing(info)
        if (info.gated or False) != gated and (gated or self.target.gated == "no"):
            self.repo.ask("set who gets access", self._set(gated=gated))
        return info

    def _check_existing(self, info: ModelInfo) -> None:
        """Refuses a repository that is public already, or has files that we did not make."""
        refs = self.repo.refs()
        branches = {ref.name for ref in refs.branches} & {"main", self.target.revision}
        trees = [self.repo.tree(branch) for branch in sorted(branches)]
        planned = {file.path for file in self.plan.files}
        theirs = {path for tree in trees if RECORD not in tree for path in tree}
        foreign = sorted(theirs.union(*trees) - (planned - theirs) - OF_THE_HUB)
        if foreign and not self.target.into_existing:
            raise PublishError(
                f"{self.repo.id} has files that abliterator did not make "
                f"({', '.join(foreign[:_TOLD])}). Nothing was uploaded. Choose another --repo-id, "
                "or give --into-existing: they then stay beside ours, and those of the same name "
                "are replaced."
            )
        opened = list(filter(is_opened_by_loaders, sorted(set(foreign) - planned)))
        if opened:
            raise PublishError(
                f"{self.repo.id} has files that a loader would open beside ours, or in their place "
                f"({', '.join(opened[:_TOLD])}), so it would load as another model. Nothing was "
                "uploaded. Delete them there, or choose another --repo-id."
            )
        if not info.private:
            self._check_public(any(self._missing(tree) for tree in trees))

    def _check_public(self, would_change: bool) -> None:
        """Refuses to write into what everybody can see, unless that was asked for."""
        if not (self.target.public or self.target.create_pr):
            raise PublishError(
                f"{self.repo.id} is public, so whatever is uploaded is seen at once. Nothing was. "
                "Give --public if that is wanted, or choose another --repo-id."
            )
        if would_change and not self.target.into_existing:
            raise PublishError(
                f"{self.repo.id} is public and has other contents: new ones would be seen before "
                "they are checked. Nothing was uploaded. Make it private first, or give "
                "--into-existing."
            )

    def _make_branch(self) -> None:
        branch = self.target.revision
        if branch != "main":
            self.repo.ask(
                "create the branch",
                lambda: self.api.create_branch(self.repo.id, branch=branch, exist_ok=True),
            )

    def _missing(self, there: Mapping[str, RepoFile]) -> list[PlannedFile]:
        return [file for file in self.plan.files if not _is_same(file, there.get(file.path))]

    def _upload(self, info: ModelInfo) -> tuple[str, str, tuple[str, ...]]:
        """One commit of what is missing: (commit, url, files sent)."""
        operations: dict[str, CommitOperationAdd] = {}
        sent: tuple[str, ...] = ()

        def commit() -> tuple[str, str]:
            # looked at again in every attempt: an answer that was lost may have been a yes
            nonlocal sent
            head = self.api.model_info(self.repo.id, revision=self.target.revision).sha
            missing = self._missing(self.repo.tree(head or self.target.revision))
            if not missing and head is not None:
                return head, f"{self.api.endpoint}/{self.repo.id}"
            sent = tuple(file.path for file in missing)
            self.note(f"uploading {len(missing)} files, {sum(f.size for f in missing):,} bytes")
            if head is not None and not self.target.create_pr:
                self.mark.place(head)
            self._send_large(missing, operations)
            made = self.api.create_commit(
                self.repo.id,
                [operations[file.path] for file in missing],
                commit_message=f"Upload {self.plan.what} (abliterator {version('abliterator')})",
                revision=self.target.revision,
                parent_commit=head,
                create_pr=self.target.create_pr,
            )
            return made.oid, made.pr_url or f"{self.api.endpoint}/{self.repo.id}"

        oid, url = self.repo.ask("upload the files", commit)
        return oid, url, sent

    def _send_large(
        self, files: list[PlannedFile], operations: dict[str, CommitOperationAdd]
    ) -> None:
        """Uploads what goes apart from the commit; the bytes that were read must be the verified.

        Args:
            files: what is to be committed.
            operations: by path; those that are missing are added, and they know what is uploaded.
        """
        from huggingface_hub import CommitOperationAdd

        stamps = {Path(str(f.content)): f.stamp for f in files if f.stamp is not None}
        try:
            for file in files:
                if file.path not in operations:
                    operations[file.path] = CommitOperationAdd(file.path, file.content)
            self.api.preupload_lfs_files(
                self.repo.id,
                [operations[file.path] for file in files],
                revision=self.target.revision,
                create_pr=self.target.create_pr,
            )
        except failures():
            require_unchanged(stamps)  # a file that is gone is no failure of the Hub
            raise
        require_unchanged(stamps)
        for file in files:
            # the hash that the Hub was given, taken while the file was read
            if operations[file.path].upload_info.sha256.hex() != file.sha256:
                raise changed([Path(str(file.content))])

    def _read_back(self, commit: str) -> str:
        """The commit that has exactly the planned contents, and none before it that has others."""
        self.note("reading back what arrived")
        wrong = self._differing(commit)
        if wrong:
            left = self.mark.withdraw(commit, [file.path for file in self.plan.files])
            raise PublishError(
                f"What {self.repo.id} has at commit {commit[:12]} is not what was sent: "
                f"{', '.join(wrong[:_TOLD])} differ by hash or are missing. It was not made "
                f"public. {left} Run the same command again; it sends only what is missing."
            )
        return self.mark.clear(commit, self._differing, strict=self.target.public)

    def _differing(self, commit: str) -> list[str]:
        return [file.path for file in self._missing(self.repo.tree(commit))]

    def _tag(self, tag: str, commit: str) -> None:
        self.repo.ask(
            f"tag it {tag}",
            lambda: self.api.create_tag(self.repo.id, tag=tag, revision=commit, exist_ok=True),
        )
        refs = self.repo.refs()
        if not any(ref.name == tag and ref.target_commit == commit for ref in refs.tags):
            raise PublishError(
                f"{self.repo.id} has a tag {tag!r} already, on another commit; it was left there. "
                "What was uploaded stays private. Choose another --tag."
            )


def _is_same(file: PlannedFile, there: RepoFile | None) -> bool:
    """Whether the Hub has a file's bytes, by the hash that the Hub keeps of it."""
    if there is None or there.size != file.size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == file.sha256
    return file.git_blob is not None and there.blob_id == file.git_blob
