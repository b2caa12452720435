"""Plans an upload, and checks that it is allowed, without network access."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from abliterator.card import with_license
from abliterator.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_legal
from abliterator.errors import PublishError
from abliterator.files import read_text, sha256_of_bytes
from abliterator.publish._files import PlannedFile, stamps_of, verified_files
from abliterator.publish._require import require_measured
from abliterator.record import AdapterVerification, Frozen, RunRecord, Verification
from abliterator.verification import (
    CARD,
    DIRECTIONS,
    OURS,
    PICTURES,
    RECORD,
    verify,
    verify_adapter,
)

Gating = Literal["auto", "manual", "no"]

REPO_ID = re.compile(r"(?=.{1,96}\Z)(?!.*(--|\.\.))(\w[\w.-]*/)?\w[\w.-]*(?<![.-])", re.ASCII)
# Names that the licences of these models ask a derived model's name to begin with.
_LLAMA_NAME = re.compile(r"llama(-?3|-?4)", re.IGNORECASE)
_FAULTS_SHOWN = 5


@dataclass(frozen=True)
class Target:
    """The repository on the Hub for a checkpoint, and its visibility.

    Attributes:
        repo_id: "name" of your own, or "namespace/name".
        public: make it public when all of it has arrived; private otherwise.
        gated: "auto", "manual" or "no"; None is gated like the base ("manual" for a gated base).
        revision: branch that gets the commit.
        create_pr: open a pull request in place of a commit to the branch.
        tag: name of a tag to put on the commit.
        into_existing: upload into a repository with files that abliterator did not make.
        license: the base's licence on the Hub, where the base itself does not state it.
    """

    repo_id: str
    public: bool = False
    gated: Gating | None = None
    revision: str = "main"
    create_pr: bool = False
    tag: str | None = None
    into_existing: bool = False
    license: str | None = None


class Folders(NamedTuple):
    """Folders of base and edited checkpoint; `subspace` is for measuring the leak again."""

    base: Path
    checkpoint: Path
    subspace: Path | None = None


class PlanSummary(Frozen):
    """The upload of a plan, as `abliterator publish --dry-run --json` prints it."""

    what: Literal["checkpoint", "adapter"]
    repo_id: str
    visibility: Literal["public", "private"]
    gated: str
    revision: str
    pull_request: bool
    tag: str | None
    bytes: int
    files: tuple[PlannedFile, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class PublishPlan:
    """The verified files to upload and their target; made by `plan_publish` and `plan_adapter`.

    Attributes:
        what: "checkpoint", or "adapter".
        target: where to.
        files: exactly what will be uploaded.
        left_out: files of the folder that neither base nor record has; they stay.
        base: Hub id of the base, None for a local one.
        remote_code: whether the model needs its own Python files to load.
        folders: what was verified, and against what.
        verification: its result.
    """

    what: Literal["checkpoint", "adapter"]
    target: Target
    files: tuple[PlannedFile, ...]
    left_out: tuple[str, ...]
    base: str | None
    remote_code: bool
    folders: Folders
    verification: Verification | AdapterVerification

    @property
    def total_bytes(self) -> int:
        """Size of all that will be uploaded."""
        return sum(file.size for file in self.files)

    @property
    def summary(self) -> PlanSummary:
        """What would be uploaded, and where to."""
        target = self.target
        return PlanSummary(
            what=self.what,
            repo_id=target.repo_id,
            visibility="public" if target.public else "private",
            gated=target.gated or "as the base is",
            revision=target.revision,
            pull_request=target.create_pr,
            tag=target.tag,
            bytes=self.total_bytes,
            files=self.files,
            left_out=self.left_out,
        )


def plan_publish(
    base: Path,
    checkpoint: Path,
    target: Target,
    *,
    subspace: Path | None = None,
) -> PublishPlan:
    """Verifies a checkpoint and plans its upload; nothing is sent.

    Args:
        base: folder of the base model.
        checkpoint: OUT/checkpoint.
        target: where to.
        subspace: the removed subspace, for measuring the leak again.

    Raises:
        PublishError: if the checkpoint does not verify, is incomplete, may not go by that name, or
            does not measure what its recipe requires.
    """
    _check_target(target)
    before = stamps_of(checkpoint)
    record = _read_record(checkpoint)
    _check_license(record, target)
    require_measured(record)
    verification = verify(base, checkpoint, subspace=subspace)
    _require_sound(checkpoint, verification)
    files = verified_files(checkpoint, verification.sha256, before)
    if target.license is not None:
        files = [_with_license(file, target.license) for file in files]
    return PublishPlan(
        "checkpoint",
        target,
        tuple(files),
        verification.foreign,
        record.model.id if record.model.revision is not None else None,
        record.recipe.get("trust_remote_code") is True,
        Folders(base, checkpoint, subspace),
        verification,
    )


def plan_adapter(checkpoint: PublishPlan, adapter: Path, target: Target) -> PublishPlan:
    """Verifies an adapter against the checkpoint of its run, and plans its upload.

    The plan includes the recipe, the records and the pictures of the checkpoint, by which a reader
    can judge the adapter, and the base's licence files.

    Args:
        checkpoint: the plan of the checkpoint, which verified; it need not be carried out.
        adapter: OUT/adapter.
        target: where to.

    Raises:
        PublishError: if the adapter is not there, does not verify, or may not go by that name.
    """
    _check_target(target)
    folders = checkpoint.folders
    _check_license(_read_record(folders.checkpoint), target)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD):
        if not (adapter / name).is_file():
            raise PublishError(
                f"{adapter} has no {name}; an adapter that a whole `abliterator build` left was "
                "expected. Set `edit.output: both` in the recipe, and build."
            )
    before, compared = stamps_of(adapter), stamps_of(folders.checkpoint)
    verification = verify_adapter(
        folders.base, folders.checkpoint, adapter, subspace=folders.subspace
    )
    _require_sound(adapter, verification)
    adapter_files = verified_files(adapter, verification.sha256, before)
    # what the adapter was compared with must be what the checkpoint's own plan is made of
    compared |= {file.path: file.stamp for file in checkpoint.files if file.stamp is not None}
    verified_files(folders.checkpoint, checkpoint.verification.sha256, compared)
    if target.license is not None:
        adapter_files = [_with_license(file, target.license) for file in adapter_files]
    ours = {*OURS, *PICTURES, DIRECTIONS} - {CARD}
    checkpoint_files = [f for f in checkpoint.files if f.path in ours or is_legal(f.path)]
    return replace(
        checkpoint,
        what="adapter",
        target=target,
        files=tuple(sorted([*adapter_files, *checkpoint_files], key=lambda file: file.path)),
        left_out=verification.foreign,
        verification=verification,
    )


def _require_sound(folder: Path, verification: Verification | AdapterVerification) -> None:
    if verification.ok:
        return
    faults = verification.faults
    hidden = len(faults) - _FAULTS_SHOWN
    summary = " ".join(faults[:_FAULTS_SHOWN]) + (f" And {hidden} more." if hidden > 0 else "")
    raise PublishError(
        f"{folder} does not verify against its base, so nothing of it is published. {summary} "
        "Build it again."
    )


def _check_target(target: Target) -> None:
    if not REPO_ID.fullmatch(target.repo_id):
        raise PublishError(
            f"{target.repo_id!r} is no name for a repository. Names look like "
            "me/Llama-3.2-1B-Instruct-abliterated: letters, digits, '-', '_' and '.'."
        )
    if target.create_pr and (target.public or target.tag or target.revision != "main"):
        raise PublishError(
            "A pull request (--create-pr) goes to the main branch of a repository as it is: it "
            "takes neither --public nor --tag nor --revision. Merge it first."
        )


def _read_record(checkpoint: Path) -> RunRecord:
    missing = [name for name in OURS if not (checkpoint / name).is_file()]
    if missing:
        raise PublishError(
            f"{checkpoint} has no {', '.join(missing)}; a checkpoint that a whole "
            "`abliterator build` left was expected. Run the build to its end first."
        )
    try:
        return RunRecord.model_validate_json(read_text(checkpoint / RECORD))
    except ValueError as error:
        raise PublishError(
            f"{checkpoint / RECORD} is not a record that this version of abliterator reads. Run "
            "`abliterator card` again."
        ) from error


def _check_license(record: RunRecord, target: Target) -> None:
    base_license = record.model.license
    if base_license is None and target.license is None:
        raise PublishError(
            f"The base model {record.model.id} does not state its licence, and that licence binds "
            "whoever passes the model on. Read it, and give its Hub name: --license apache-2.0, "
            "for example."
        )
    allowed = {None, base_license, base_license and base_license.lower()}
    if base_license is not None and target.license not in allowed:
        raise PublishError(
            f"The base's licence is {base_license!r}; an edited model cannot be given another one "
            f"({target.license!r}). Leave --license out."
        )
    name = target.repo_id.rpartition("/")[2]
    if _LLAMA_NAME.match(target.license or base_license or "") and not name.startswith("Llama"):
        raise PublishError(
            f"The licence of {record.model.id} asks that the name of a model made from it begin "
            f"with 'Llama'; {name!r} does not. Try --repo-id "
            f"{target.repo_id.removesuffix(name)}Llama-{name}."
        )


def _with_license(file: PlannedFile, license_id: str) -> PlannedFile:
    """The card with a licence in its header, where it had none; any other file as it is."""
    from yaml import YAMLError

    if file.path != CARD:
        return file
    if isinstance(file.content, bytes):
        with suppress(ValueError, YAMLError):
            content = with_license(file.content.decode(), license_id).encode()
            digest = sha256_of_bytes(content)
            return PlannedFile(path=file.path, size=len(content), sha256=digest, content=content)
    raise PublishError(f"{file.path} has no header that can be read. Run `abliterator card` again.")
