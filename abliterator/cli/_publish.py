"""The commands that prove a checkpoint and put it on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from abliterator.cli._options import JSON
from abliterator.cli._show import Bars
from abliterator.errors import OutputError

if TYPE_CHECKING:
    from abliterator.publish import PublishPlan
    from abliterator.verification import Verification

BASE = click.option(
    "--base", help="Folder or Hub id of the base.  [default: what OUT was built from]"
)


class _Folders(NamedTuple):
    base: Path
    checkpoint: Path
    subspace: Path | None


def _folders(out: Path, base: str | None) -> _Folders:
    """Base, checkpoint and subspace of the folder of a run, or of a checkpoint alone."""
    from abliterator import pipeline
    from abliterator.record import RunRecord
    from abliterator.source import resolve_folder
    from abliterator.verification import EDITS, RECORD

    if (out / "work").is_dir():
        recipe = pipeline.recipe_of(out)
        model, revision = recipe.model, recipe.revision
        checkpoint, subspace = out / "checkpoint", out / "work" / "directions.safetensors"
    elif (out / EDITS).is_file():
        record = out / RECORD
        known = RunRecord.model_validate_json(record.read_text()) if record.is_file() else None
        if base is None and (known is None or known.model.revision is None):
            raise OutputError(f"{out} does not say where its base is: give it with --base.")
        model, revision = (known.model.id, known.model.revision) if known else ("", None)
        checkpoint, subspace = out, None
    else:
        raise OutputError(
            f"{out} is neither the folder of a build nor a checkpoint that abliterator made."
        )
    source = resolve_folder(base or model, revision=None if base else revision)
    return _Folders(source.folder, checkpoint, subspace)


@click.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@BASE
@click.option(
    "--subspace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What was removed, to measure the leak again.  [default: the build's]",
)
@JSON
@click.pass_context
def verify(
    ctx: click.Context, out: Path, base: str | None, subspace: Path | None, as_json: bool
) -> None:
    """Prove that OUT is its base but for the edits: every byte compared, the leak measured again.

    OUT is the folder of a build, or a checkpoint folder (also one from the Hub).
    """
    from abliterator.verification import verify as prove

    base_folder, checkpoint, own = _folders(out, base)
    found = prove(base_folder, checkpoint, subspace=subspace or own)
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else _told(found, checkpoint))
    if not found.ok:
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


@click.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--repo-id", required=True, help="Name of the repository: NAME or NAMESPACE/NAME.")
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
def publish(out: Path, base: str | None, dry_run: bool, as_json: bool, **target: object) -> None:
    """Verify OUT and upload it to the Hub, private until every hash was read back.

    The token is taken from HF_TOKEN or from `hf auth login`.
    """
    from abliterator import publish as room

    base_folder, checkpoint, subspace = _folders(out, base)
    plan = room.plan_publish(
        base_folder,
        checkpoint,
        room.Target(**target),  # type: ignore[arg-type]
        subspace=subspace,
    )
    if not as_json:
        click.echo(_planned(plan))
    if dry_run:
        if as_json:
            click.echo(json.dumps(plan.to_json(), indent=1))
        return
    done = room.publish(plan, note=Bars().note)
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=1))
        return
    visible = "public" if done.public else "private"
    click.echo(f"{done.url}: {visible}, commit {done.commit[:12]}, {len(done.uploaded)} files sent")


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
