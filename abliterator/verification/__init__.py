"""The byte contract, proven from the files: an edited checkpoint against its base.

Every byte that `edits.json` does not name is compared with the base's, headers included; every
tensor that it names is hashed on both sides, and what it still writes into the removed subspace is
measured again from the stored bytes. config.json is the one file that may differ, and it is
computed again from the base's. An adapter, merged into the base, must give the checkpoint's weights
up to rounding, and nothing else. Where there is a record, card and recipe must be those that follow
from it. How the edit was made, and where the folders came from, is outside this package.

    findings = verify(base_folder, out / "checkpoint", subspace=out / "work/directions.safetensors")
    findings.ok, findings.faults, findings.max_leak
    verify_adapter(base_folder, out / "checkpoint", out / "adapter").ok

Of a checkpoint that anybody edited, `stored_strengths` and `measured_strengths` say how strongly a
subspace was removed.
"""

from abliterator.verification._adapter import verify_adapter
from abliterator.verification._auxiliary import recipe_text
from abliterator.verification._compare import verify
from abliterator.verification._findings import (
    BASE_CARD,
    CARD,
    DIRECTIONS,
    EDITS,
    OURS,
    PICTURES,
    RECIPE,
    RECORD,
    read_edits,
)
from abliterator.verification._forward import measured_strengths
from abliterator.verification._strength import stored_strengths

__all__ = [
    "BASE_CARD",
    "CARD",
    "DIRECTIONS",
    "EDITS",
    "OURS",
    "PICTURES",
    "RECIPE",
    "RECORD",
    "measured_strengths",
    "read_edits",
    "recipe_text",
    "stored_strengths",
    "verify",
    "verify_adapter",
]
