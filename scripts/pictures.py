"""Draw the README's pictures from a finished build: a heatmap, and its report in Chromium.

    abliterator build recipes/smollm2.yaml --set model=FOLDER
    python scripts/pictures.py out/smollm2 [CHROMIUM]

Needs `pip install 'abliterator[plots]'` and Chromium. The pictures show prompts and answers of the
build, which for this recipe are those of recipes/smollm2.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from abliterator.pipeline import write_report
from abliterator.plots import draw_cosines

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
WINDOW = "1280,1540"  # pixels: the summary, and the first answers


def main() -> None:
    """Writes docs/pictures/heatmap.png and docs/pictures/report.png."""
    out = Path(sys.argv[1])
    chromium = sys.argv[2] if sys.argv[2:] else shutil.which("chromium")
    if chromium is None:
        sys.exit("Chromium was not found: give its path as the second argument.")
    PICTURES.mkdir(exist_ok=True)
    vectors = load_file(out / "work" / "directions.safetensors")["directions"]
    unit = torch.nn.functional.normalize(vectors, dim=1)
    draw_cosines(PICTURES / "heatmap.png", (unit @ unit.T).tolist(), range(1, len(unit) + 1))
    with tempfile.TemporaryDirectory() as folder:
        report = write_report([out], Path(folder) / "report.html")
        command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars"]
        command += [f"--window-size={WINDOW}", f"--screenshot={PICTURES / 'report.png'}"]
        subprocess.run([*command, report.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
