"""`abliterator verify`: proves that a checkpoint is its base with the edits, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from abliterator.cli._options import BASE, FILE, FOLDER, JSON, build_folders
from abliterator.cli._outcome import leak_text
from abliterator.cli._terminal import show

if TYPE_CHECKING:
    from abliterator.record import AdapterVerification, Verification


@click.command(short_help="Prove a checkpoint from its files.")
@click.argument("out", type=FOLDER)
@click.option(
    "--adapter",
    type=FOLDER,
    help="Folder of its adapter.  [default: OUT/adapter, if it is there]",
)
@BASE
@click.option(
    "--subspace",
    type=FILE,
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
    from abliterator import verification

    folders = build_folders(out, base)
    subspace = subspace or folders.subspace
    proof = verification.verify(folders.base, folders.checkpoint, subspace=subspace)
    if adapter is None and folders.adapter is not None and folders.adapter.is_dir():
        adapter = folders.adapter
    adapter_proof = None
    if adapter is not None and proof.ok:  # beside a checkpoint that is not sound it proves nothing
        adapter_proof = verification.verify_adapter(
            folders.base, folders.checkpoint, adapter, subspace=subspace
        )

    def as_text(_: object) -> str:
        texts = [_checkpoint_text(proof, folders.checkpoint)]
        if adapter_proof is not None:
            texts.append(_adapter_text(adapter_proof, adapter))
        elif adapter is not None:
            texts.append(f"{adapter}: not looked at, for it is proven against the checkpoint")
        return "\n".join(texts)

    result = {**proof.model_dump(by_alias=True), "adapter": adapter_proof}
    show(result, as_text, as_json=as_json)
    if not (proof.ok and (adapter_proof is None or adapter_proof.ok)):
        ctx.exit(1)


def _checkpoint_text(proof: Verification, checkpoint: Path) -> str:
    from abliterator import verification

    leak = "leak not measured again"
    if proof.max_leak is not None:
        leak = leak_text(verification.read_edits(checkpoint), proof.max_leak)
    if proof.max_apart is not None:
        leak = (
            f"each is W - U V^T W of its own, within {proof.max_apart:.2f} roundings; "
            "no shared subspace is promised to be absent"
        )
    return "\n".join(
        [
            f"{checkpoint}: {'verified' if proof.ok else 'NOT its base with the edits it names'}",
            f"identical  {proof.tensors - proof.edited} tensors, every header and file: "
            f"{proof.identical_bytes:,} bytes",
            f"edited     {proof.edited} tensors, {proof.edited_bytes:,} bytes; {leak}",
            *_partial_lines(proof),
            *(f"not ours   {name}" for name in proof.foreign),
            *(f"fault      {fault}" for fault in proof.faults),
        ]
    )


def _partial_lines(proof: Verification) -> list[str]:
    """What a proof of a partial edit does not say; nothing where the edit is whole."""
    if proof.partial is None:
        return []
    return [
        "partial    proven of what the writers write; the stream still holds a part of the "
        f"directions, because {proof.partial}"
    ]


def _adapter_text(proof: AdapterVerification, adapter: Path | None) -> str:
    apart = "nothing" if proof.max_apart is None else f"at most {proof.max_apart:.2f} roundings"
    leak = "not measured" if proof.max_leak is None else f"at most {proof.max_leak:.1e}"
    return "\n".join(
        [
            f"{adapter}: {'verified' if proof.ok else 'NOT the edit of the checkpoint'}",
            f"merged     {proof.modules} modules, apart from the checkpoint: {apart}; leak {leak}",
            *(f"not ours   {name}" for name in proof.foreign),
            *(f"fault      {fault}" for fault in proof.faults),
        ]
    )
