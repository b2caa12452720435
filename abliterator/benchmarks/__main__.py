"""The process in which one side is scored; `measure_sides` starts it."""

import sys
from pathlib import Path

from abliterator.benchmarks._apart import main

sys.exit(main(Path(sys.argv[1])))
