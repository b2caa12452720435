"""The byte contract, proven from the files: an edited checkpoint against its base.

Nothing is taken at its word. Every byte that `edits.json` does not name is compared with the
base's, headers included; every tensor that it names is hashed on both sides, and what it still
writes into the removed subspace is measured again from the stored bytes. The room knows neither how
the edit was made nor where the folders came from.

    found = verify(base_folder, out / "checkpoint", subspace=out / "work/directions.safetensors")
    found.ok, found.faults, found.max_leak
"""

from abliterator.verification._compare import (
    EDITS,
    OURS,
    RECORD,
    Verification,
    read_edits,
    verify,
)

__all__ = ["EDITS", "OURS", "RECORD", "Verification", "read_edits", "verify"]
