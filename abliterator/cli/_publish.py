"""`abliterator publish`: a checkpoint or its adapter, verified and put on the Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from abliterator.cli._options import BASE, FOLDER, JSON, build_folders
from abliterator.cli._terminal import Bars, echo, show

if TYPE_CHECKING:
    from abliterator.publish import PlanSummary, PublishPlan


@click.command(short_help="Verify and upload to the Hub, privately.")
@click.argument("out", type=FOLDER)
@click.option("--repo-id", help="Repository for the checkpoint: NAME or NAMESPACE/NAME.")
@click.option("--adapter-repo-id", help="Repository for the adapter, which is never the same.")
@click.option("--dry-run", is_flag=True, help="Verify, show what would be uploaded, and stop.")
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
    from abliterator import publish as hub

    if repo_id == adapter_repo_id:
        raise click.UsageError("Give --repo-id, --adapter-repo-id, or both, each its own name.")
    folders = build_folders(out, base)
    hub_target = hub.Target(repo_id or adapter_repo_id, **target)  # type: ignore[arg-type]
    checkpoint = hub.plan_publish(
        folders.base, folders.checkpoint, hub_target, subspace=folders.subspace
    )
    plans = [checkpoint] if repo_id is not None else []
    if adapter_repo_id is not None:
        adapter = folders.adapter or out / "adapter"
        hub_target = replace(hub_target, repo_id=adapter_repo_id)
        plans.append(hub.plan_adapter(checkpoint, adapter, hub_target))
    _publish_plans(plans, dry_run=dry_run, as_json=as_json)
    if adapter_repo_id is None and folders.adapter is not None and folders.adapter.is_dir():
        hint = "--adapter-repo-id NAME publishes it"
        echo(f"{folders.adapter} is not part of this: {hint}", err=True)


def _publish_plans(plans: list[PublishPlan], *, dry_run: bool, as_json: bool) -> None:
    """Prints the plans, and publishes one after the other; JSON is one object for each."""
    from abliterator import publish as hub

    summaries = [plan.summary for plan in plans]
    if not as_json:
        echo("\n".join(map(_plan_text, summaries)))
    results = [] if dry_run else [hub.publish(plan, note=Bars().note) for plan in plans]
    printed = summaries if dry_run else results
    if as_json:
        show(printed[0] if len(printed) == 1 else printed, str, as_json=True)
    for result in [] if as_json else results:
        echo(
            f"{result.url}: {'public' if result.public else 'private'}, commit "
            f"{result.commit[:12]}, {len(result.uploaded)} files sent"
        )


def _plan_text(plan: PlanSummary) -> str:
    lines = [
        f"{plan.repo_id}: {plan.visibility}, gated: {plan.gated}, "
        f"{'a pull request' if plan.pull_request else 'branch ' + plan.revision}"
        f"{', tag ' + plan.tag if plan.tag else ''}",
        *(f"{f.size:>15,}  {f.sha256[:12]}  {f.path}" for f in plan.files),
        f"{plan.bytes:>15,}  in all",
        *(f"not uploaded, not ours: {name}" for name in plan.left_out),
    ]
    return "\n".join(lines)
