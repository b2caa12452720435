"""The plan, carried out: every request that changes something on the Hub is made here."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

from abliterator.checkpoint import is_opened_by_loaders
from abliterator.errors import PublishError
from abliterator.publish._load import check_loads
from abliterator.publish._plan import PlannedFile, PublishPlan
from abliterator.publish._refused import Refusal, explain, failures
from abliterator.verification import RECORD

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

Result = TypeVar("Result")

ATTEMPTS = 4
_OF_THE_HUB = {".gitattributes"}  # every new repository has it
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
        from huggingface_hub import HfApi

        self.plan, self.target, self.note = plan, plan.target, note
        self.api: HfApi = HfApi(library_name="abliterator", library_version=version("abliterator"))
        self.repo_id = plan.target.repo_id

    def run(self) -> Published:
        """All steps, in the one order that is safe."""
        who = self._ask("ask who you are", self.api.whoami)
        if "/" not in self.repo_id:
            self.repo_id = f"{who['name']}/{self.repo_id}"
        gated = self._wanted_gating()
        info = self._open(gated)
        self._make_branch()
        commit, url, sent = self._upload(info)
        self._read_back(commit)
        if self.target.tag is not None:
            self._tag(self.target.tag, commit)
        if self.target.public and info.private:
            self.note("making it public")
            self._ask("make it public", self._set(private=False))
        after = self._info()
        planned = tuple(file.path for file in self.plan.files)
        unchanged = tuple(path for path in planned if path not in sent)
        return Published(
            url, self.repo_id, commit, sent, unchanged, not after.private, after.gated or False
        )

    def _ask(self, what: str, call: Callable[[], Result]) -> Result:
        """Asks the Hub; waits and asks again when it is busy or cannot be reached."""
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
        raise PublishError(f"Could not {what} ({self.repo_id}): {refusal.problem}.")

    def _set(self, **settings: Any) -> Callable[[], None]:
        return lambda: self.api.update_repo_settings(self.repo_id, **settings)

    def _wanted_gating(self) -> str | bool:
        if self.target.gated is not None:
            return False if self.target.gated == "no" else self.target.gated
        base = self.plan.base
        if base is None:
            return False
        info = self._ask(f"ask whether {base} is gated", lambda: self.api.model_info(base))
        return info.gated or False

    def _info(self) -> ModelInfo:
        return self._ask("look at the repository", lambda: self.api.model_info(self.repo_id))

    def _open(self, gated: str | bool) -> ModelInfo:
        """The repository: made private, or found to be ours."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        def look() -> ModelInfo | None:
            try:
                return self.api.model_info(self.repo_id)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

        def create() -> None:
            if look() is None:  # an answer that was lost may have been a yes
                self.api.create_repo(self.repo_id, private=True)

        info = self._ask("look for the repository", look)
        if info is None:
            self.note(f"creating {self.repo_id}, private")
            self._ask("create the repository", create)
            info = self._info()
            if not info.private:
                raise PublishError(
                    f"{self.repo_id} was asked for as private, but the Hub says it is public. "
                    "Nothing was uploaded. Look at its settings, and at those of your organisation."
                )
        self._check_existing(info)
        if (info.gated or False) != gated and (gated or self.target.gated == "no"):
            self._ask("set who gets access", self._set(gated=gated))
        return info

    def _check_existing(self, info: ModelInfo) -> None:
        """Refuses a repository that is public already, or has files that we did not make."""
        refs = self._ask("look at its branches", lambda: self.api.list_repo_refs(self.repo_id))
        branches = {ref.name for ref in refs.branches} & {"main", self.target.revision}
        trees = [self._tree(branch) for branch in sorted(branches)]
        planned = {file.path for file in self.plan.files}
        theirs = {path for tree in trees if RECORD not in tree for path in tree}
        foreign = sorted(theirs.union(*trees) - (planned - theirs) - _OF_THE_HUB)
        if foreign and not self.target.into_existing:
            raise PublishError(
                f"{self.repo_id} has files that abliterator did not make "
                f"({', '.join(foreign[:_TOLD])}). Nothing was uploaded. Choose another --repo-id, "
                "or give --into-existing: they then stay beside ours, and those of the same name "
                "are replaced."
            )
        opened = list(filter(is_opened_by_loaders, sorted(set(foreign) - planned)))
        if opened:
            raise PublishError(
                f"{self.repo_id} has files that a loader would open beside ours, or in their place "
                f"({', '.join(opened[:_TOLD])}), so it would load as another model. Nothing was "
                "uploaded. Delete them there, or choose another --repo-id."
            )
        if not info.private:
            self._check_public(any(self._missing(tree) for tree in trees))

    def _check_public(self, would_change: bool) -> None:
        """Refuses to write into what everybody can see, unless that was asked for."""
        if not (self.target.public or self.target.create_pr):
            raise PublishError(
                f"{self.repo_id} is public, so whatever is uploaded is seen at once. Nothing was. "
                "Give --public if that is wanted, or choose another --repo-id."
            )
        if would_change and not self.target.into_existing:
            raise PublishError(
                f"{self.repo_id} is public and has other contents: new ones would be seen before "
                "they are checked. Nothing was uploaded. Make it private first, or give "
                "--into-existing."
            )

    def _make_branch(self) -> None:
        branch = self.target.revision
        if branch != "main":
            self._ask(
                "create the branch",
                lambda: self.api.create_branch(self.repo_id, branch=branch, exist_ok=True),
            )

    def _tree(self, revision: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        def walk() -> dict[str, RepoFile]:
            entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

        return self._ask("list the files", walk)

    def _missing(self, there: Mapping[str, RepoFile]) -> list[PlannedFile]:
        return [file for file in self.plan.files if not _is_same(file, there.get(file.path))]

    def _upload(self, info: ModelInfo) -> tuple[str, str, tuple[str, ...]]:
        """One commit of what is missing: (commit, url, files sent)."""
        from huggingface_hub import CommitOperationAdd

        operations = {
            file.path: CommitOperationAdd(file.path, file.content) for file in self.plan.files
        }
        sent: tuple[str, ...] = ()

        def commit() -> tuple[str, str]:
            # looked at again in every attempt: an answer that was lost may have been a yes
            nonlocal sent
            head = self.api.model_info(self.repo_id, revision=self.target.revision).sha
            missing = self._missing(self._tree(head or self.target.revision))
            if not missing and head is not None:
                return head, f"{self.api.endpoint}/{self.repo_id}"
            sent = tuple(file.path for file in missing)
            self.note(f"uploading {len(missing)} files, {sum(f.size for f in missing):,} bytes")
            made = self.api.create_commit(
                self.repo_id,
                [operations[file.path] for file in missing],
                commit_message=f"Upload {self.plan.what} (abliterator {version('abliterator')})",
                revision=self.target.revision,
                parent_commit=head,
                create_pr=self.target.create_pr,
            )
            return made.oid, made.pr_url or f"{self.api.endpoint}/{self.repo_id}"

        oid, url = self._ask("upload the files", commit)
        return oid, url, sent

    def _read_back(self, commit: str) -> None:
        self.note("reading back what arrived")
        wrong = [file.path for file in self._missing(self._tree(commit))]
        if wrong:
            raise PublishError(
                f"What {self.repo_id} has at commit {commit[:12]} is not what was sent: "
                f"{', '.join(wrong[:_TOLD])} differ by hash or are missing. It was not made "
                "public. Run the same command again; it sends only what is wrong."
            )

    def _tag(self, tag: str, commit: str) -> None:
        self._ask(
            f"tag it {tag}",
            lambda: self.api.create_tag(self.repo_id, tag=tag, revision=commit, exist_ok=True),
        )
        refs = self._ask("look at its tags", lambda: self.api.list_repo_refs(self.repo_id))
        if not any(ref.name == tag and ref.target_commit == commit for ref in refs.tags):
            raise PublishError(
                f"{self.repo_id} has a tag {tag!r} already, on another commit; it was left there. "
                "What was uploaded stays private. Choose another --tag."
            )


def _is_same(file: PlannedFile, there: RepoFile | None) -> bool:
    """Whether the Hub has a file's bytes, by the hash that the Hub keeps of it."""
    if there is None or there.size != file.size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == file.sha256
    content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
    same_as_planned = hashlib.sha256(content).hexdigest() == file.sha256
    # git's name of a file that is not a large one
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return same_as_planned and there.blob_id == blob
