"""Commits the planned files that a repository lacks, with the bytes that were verified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from abliterator.publish._files import PlannedFile, changed, require_unchanged
from abliterator.publish._mark import Mark
from abliterator.publish._plan import PublishPlan
from abliterator.publish._refused import failures
from abliterator.publish._repository import Repository

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile


class Upload(NamedTuple):
    """The newest commit, its address, and the paths of the files that were sent for it."""

    commit: str
    url: str
    sent: tuple[str, ...]


def missing_files(
    files: Iterable[PlannedFile], stored: Mapping[str, RepoFile]
) -> list[PlannedFile]:
    """The planned files that are missing in a commit, or have other bytes there.

    Args:
        files: of the plan.
        stored: the files of a commit, by path.
    """
    return [file for file in files if not _is_stored(file, stored.get(file.path))]


def upload(repo: Repository, plan: PublishPlan, mark: Mark) -> Upload:
    """Commits all missing files in one commit; none where no file is missing.

    Args:
        repo: that exists, with the branch of the plan.
        plan: what to send.
        mark: placed at the head before anything is committed.

    Raises:
        PublishError: if the Hub refuses, or a file changed after it was verified.
    """
    target, api = plan.target, repo.api
    page = f"{api.endpoint}/{repo.id}"
    operations: dict[str, CommitOperationAdd] = {}
    sent: tuple[str, ...] = ()

    def commit() -> tuple[str, str]:
        # compared again in every attempt: an earlier one may have succeeded unseen
        nonlocal sent
        head = api.model_info(repo.id, revision=target.revision).sha
        missing = missing_files(plan.files, repo.tree(head or target.revision))
        if not missing and head is not None:
            return head, page
        sent = tuple(file.path for file in missing)
        repo.note(f"uploading {len(missing)} files, {sum(f.size for f in missing):,} bytes")
        if head is not None and not target.create_pr:
            mark.place(head)
        _send_large(repo, plan, missing, operations)
        created = api.create_commit(
            repo.id,
            [operations[file.path] for file in missing],
            commit_message=f"Upload {plan.what} (abliterator {version('abliterator')})",
            revision=target.revision,
            parent_commit=head,
            create_pr=target.create_pr,
        )
        return created.oid, created.pr_url or page

    oid, url = repo.ask("upload the files", commit)
    return Upload(oid, url, sent)


def _send_large(
    repo: Repository,
    plan: PublishPlan,
    files: list[PlannedFile],
    operations: dict[str, CommitOperationAdd],
) -> None:
    """Uploads large files, which precede the commit, and checks the bytes that were read.

    Args:
        repo: where to.
        plan: for the branch.
        files: what is to be committed.
        operations: by path; missing ones are added. They record what is uploaded already.
    """
    from huggingface_hub import CommitOperationAdd

    stamps = {Path(str(f.content)): f.stamp for f in files if f.stamp is not None}
    try:
        for file in files:
            if file.path not in operations:
                operations[file.path] = CommitOperationAdd(file.path, file.content)
        repo.api.preupload_lfs_files(
            repo.id,
            [operations[file.path] for file in files],
            revision=plan.target.revision,
            create_pr=plan.target.create_pr,
        )
    except failures():
        require_unchanged(stamps)  # a deleted file is no failure of the Hub
        raise
    require_unchanged(stamps)
    for file in files:
        # the hash that the Hub was given, computed while the file was read
        if operations[file.path].upload_info.sha256.hex() != file.sha256:
            raise changed([Path(str(file.content))])


def _is_stored(file: PlannedFile, stored: RepoFile | None) -> bool:
    """Whether the Hub has a file's bytes, by the hash that the Hub stores of it."""
    if stored is None or stored.size != file.size:
        return False
    if stored.lfs is not None:
        return stored.lfs.sha256 == file.sha256
    return file.git_blob is not None and stored.blob_id == file.git_blob
