"""Model folders that are not what they claim, through `plan`, `bake --subspace` and `build`.

Each folder is a tiny model that loads, with one to three of its files damaged, replaced or added
to, at random from a seed. Counted as a failure is a folder that ends in a traceback or another
exit code than 0 and 1, runs for longer than a minute, takes more memory than 4 GB, leaves part of
an output folder behind, or has the content of a private file copied.

    python -m tests.hostile_folders --n 1000 --seed 0
    python -m tests.hostile_folders --seed 0 --only 17      # one folder again, with what it said
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.hostile_folders.running import Outcome, make_sound, run_all, run_batch


def main() -> int:
    """The script; the exit code is 0 where every folder was handled as promised."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=1000, help="folders")
    parser.add_argument("--start", type=int, default=0, help="number of the first folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this folder alone, with all that is said")
    parser.add_argument("--keep", type=Path, help="append outcomes to this file, a JSON line each")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        seed, numbers, place, log = asked.job
        run_batch(int(seed), [int(n) for n in numbers.split(",")], Path(place), Path(log))
        return 0
    numbers = list(range(asked.start, asked.start + asked.n))
    if asked.only is not None:
        numbers = [asked.only]

    def tell(outcome: Outcome) -> None:
        if asked.keep:
            with asked.keep.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(outcome)) + "\n")
        if outcome.fault or asked.only is not None:
            print(
                f"{outcome.number} {outcome.command}: {outcome.fault or outcome.code}", flush=True
            )
            print(f"   {outcome.what}\n   {outcome.said}", flush=True)

    with tempfile.TemporaryDirectory(prefix="hostile-folders-") as scratch:
        place = Path(scratch)
        make_sound(place)
        found = run_all(asked.seed, numbers, place, tell)
    faults = Counter(outcome.fault.partition(":")[0] for outcome in found if outcome.fault)
    codes = Counter((outcome.command, outcome.code) for outcome in found)
    print(f"seed {asked.seed}, {len({o.number for o in found})} folders, {len(found)} commands")
    print("; ".join(f"{c} exits {code}: {n}" for (c, code), n in sorted(codes.items())))
    print(f"longest {max(o.seconds for o in found):.1f} s; ", end="")
    print(f"most memory {max(o.peak for o in found) / 1e9:.2f} GB")
    print("faults: " + ("; ".join(f"{k} {n}" for k, n in faults.most_common()) or "none"))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
