"""The process in which one side is scored; `measure_sides` starts it."""

import io
import sys
from pathlib import Path

from abliterator.benchmarks._apart import main

# what lm-eval prints is not ours to encode, and must not end a measurement
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")
sys.exit(main(Path(sys.argv[1])))
