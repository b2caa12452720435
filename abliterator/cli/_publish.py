"""The commands that prove a checkpoint, and its adapter, and put them on the Hub."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from abliterator.cli._options import JSON
from abliterator.cli._print import echo
from abliterator.cli._terminal import Bars
from abliterator.errors import OutputError
from abliterator.files import read_text

if TYPE_CHECKING:
    from abliterator.publish import PublishPlan
    from abliterator.verification import AdapterVerification, Verification

BASE = click.option(
    "--base", help="Folder or Hub id of the base.  [default: what OUT was built from]"
)


class _Folders(NamedTuple):
    base: Path
    checkpoint: Path
    subspace: Path | None
    adapter: Path | None  # where it is, or would be; None beside a checkpoint alone


def _folders(out: Path, base: str | None) -> _Folders:
    """What belongs to the folder of a run, or to a checkpoint alone."""
    from abliterator import pipeline
    from abliterator.record import RunRecord
    from abliterator.source import resolve_folder
    from abliterator.verification import EDITS, RECORD

    if (out / "work").is_dir():
        recipe = pipeline.recipe_of(out)
        source = resolve_folder(base or recipe.model, revision=None if base else recipe.revision)
        work = out / "work" / "directions.safetensors"
        return _Folders(source.folder, out / "checkpoint", work, out / "adapter")
    if not (out / EDITS).is_file():
        raise OutputError(
            f"{out} is neither the folder of a build nor a checkpoint that abliterator made."
        )
    record = out / RECORD
    known = RunRecord.model_validate_json(read_text(record)).model if record.is_file() else None
    if base is None and (known is None or known.revision is None):
        raise OutputError(f"{out} does not say where its base is: give it with --base.")
    model, revision = (known.id, known.revision) if known else ("", None)
    source = resolve_folder(base or model, revision=None if base else revision)
    return _Folders(source.folder, out, None, None)


@click.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--adapter",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of its adapter.  [default: OUT/adapter, if it is there]",
)
@BASE
@click.option(
    "--subspace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What was removed, to measure the leak again.  [default: the build's]",
)
@JSON
@click.pass_context
def verify(
    ctx: click.Context,
    out: Path,
    adapter: Path | None,
    base: str | None,
    subspace: Path | None,
    as_json: bool,
) -> None:
    """Prove that OUT is its base but for the edits: every byte compared, the leak measured again.

    OUT is the folder of a build, or a checkpoint folder (also one from the Hub). An adapter is
    proven to be the same edit: merged into the base it gives the checkpoint's weights.
    """
    from abliterator import verification as room

    folders = _folders(out, base)
    subspace = subspace or folders.subspace
    found = room.verify(folders.base, folders.checkpoint, subspace=subspace)
    if adapter is None and folders.adapter is not None and folders.adapter.is_dir():
        adapter = folders.adapter
    beside = None
    if adapter is not None and found.ok:  # beside a checkpoint that is not sound it proves nothing
        beside = room.verify_adapter(folders.base, folders.checkpoint, adapter, subspace=subspace)
    if as_json:
        told = {**found.to_json(), "adapter": None if beside is None else beside.to_json()}
        echo(json.dumps(told, indent=1))
    else:
        echo(_told(found, folders.checkpoint))
        if beside is not None:
            echo(_told_adapter(beside, adapter))
        elif adapter is not None:
            echo(f"{adapter}: not looked at, for it is proven against the checkpoint")
    if not found.ok or (beside is not None and not beside.ok):
        ctx.exit(1)


def _told(found: Verification, checkpoint: Path) -> str:
    leak = "not measured again" if found.max_leak is None else f"at most {found.max_leak:.1e}"
    return "\n".join(
        [
            f"{checkpoint}: {'verified' if found.ok else 'NOT its base with the edits it names'}",
            f"identical  {found.tensors - found.edited} tensors, every header and file: "
            f"{found.identical_bytes:,} bytes",
            f"edited     {found.edited} tensors, {found.edited_bytes:,} bytes; leak {leak}",
            *(f"not ours   {name}" for name in found.foreign),
            *(f"fault      {fault}" for fault in found.faults),
        ]
    )


def _told_adapter(found: AdapterVerification, adapter: Path | None) -> str:
    apart = "nothing" if found.max_apart is None else f"at most {found.max_apart:.2f} roundings"
    leak = "not measured" if found.max_leak is None else f"at most {found.max_leak:.1e}"
    return "\n".join(
        [
            f"{adapter}: {'verified' if found.ok else 'NOT the edit of the checkpoint'}",
            f"merged     {found.modules} modules, apart from the checkpoint: {apart}; leak {leak}",
            *(f"not ours   {name}" for name in found.foreign),
            *(f"fault      {fault}" for fault in found.faults),
        ]
    )


@click.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--repo-id", help="Repository for the checkpoint: NAME or NAMESPACE/NAME.")
@click.option("--adapter-repo-id", help="Repository for the adapter, which is never the same.")
@click.option("--dry-run", is_flag=True, help="Verify, tell what would be uploaded, and stop.")
@click.option("--public", is_flag=True, help="Make it public at the end.  [default: private]")
@click.option(
    "--gated",
    type=click.Choice(["auto", "manual", "no"]),
    help="Ask people for their consent.  [default: as the base]",
)
@click.option("--revision", default="main", show_default=True, help="Branch that is written to.")
@click.option("--create-pr", is_flag=True, help="Open a pull request.")
@click.option("--tag", help="Tag the commit.")
@click.option(
    "--into-existing", is_flag=True, help="Into a repository with files that are not ours."
)
@click.option("--license", help="The base's licence, where the base does not state it.")
@BASE
@JSON
def publish(
    out: Path,
    repo_id: str | None,
    adapter_repo_id: str | None,
    base: str | None,
    dry_run: bool,
    as_json: bool,
    **target: object,
) -> None:
    """Verify OUT and upload it to the Hub, private until every hash was read back.

    With --adapter-repo-id the adapter goes to a repository of its own, after the checkpoint, or
    alone. The token is taken from HF_TOKEN or from `hf auth login`.
    """
    from abliterator import publish as room

    if repo_id == adapter_repo_id:
        raise click.UsageError("Give --repo-id, --adapter-repo-id, or both, each its own name.")
    folders = _folders(out, base)
    where = room.Target(repo_id or adapter_repo_id, **target)  # type: ignore[arg-type]
    checkpoint = room.plan_publish(
        folders.base, folders.checkpoint, where, subspace=folders.subspace
    )
    plans = [checkpoint] if repo_id is not None else []
    if adapter_repo_id is not None:
        place = folders.adapter or out / "adapter"
        where = replace(where, repo_id=adapter_repo_id)
        plans.append(room.plan_adapter(checkpoint, place, where))
    _carry_out(plans, dry_run=dry_run, as_json=as_json)
    if adapter_repo_id is None and folders.adapter is not None and folders.adapter.is_dir():
        echo(
            f"{folders.adapter} is not part of this: --adapter-repo-id NAME publishes it", err=True
        )


def _carry_out(plans: list[PublishPlan], *, dry_run: bool, as_json: bool) -> None:
    """Tells the plans, and publishes one after the other; JSON is one object for each."""
    from abliterator import publish as room

    if not as_json:
        echo("\n".join(map(_planned, plans)))
    told = [plan.to_json() for plan in plans]
    if not dry_run:
        told = [room.publish(plan, note=Bars().note).to_json() for plan in plans]
    if as_json:
        echo(json.dumps(told[0] if len(told) == 1 else told, indent=1))
    elif not dry_run:
        for done in told:
            echo(
                f"{done['url']}: {'public' if done['public'] else 'private'}, commit "
                f"{done['commit'][:12]}, {len(done['uploaded'])} files sent"
            )


def _planned(plan: PublishPlan) -> str:
    told = plan.to_json()
    lines = [
        f"{told['repo_id']}: {told['visibility']}, gated: {told['gated']}, "
        f"{'a pull request' if told['pull_request'] else 'branch ' + told['revision']}"
        f"{', tag ' + told['tag'] if told['tag'] else ''}",
        *(f"{f['size']:>15,}  {f['sha256'][:12]}  {f['path']}" for f in told["files"]),
        f"{told['bytes']:>15,}  in all",
        *(f"not uploaded, not ours: {name}" for name in told["left_out"]),
    ]
    return "\n".join(lines)
