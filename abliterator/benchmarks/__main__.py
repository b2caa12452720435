"""The process in which one side is scored; `measure_sides` starts it."""

import io
import sys
from pathlib import Path

from abliterator.benchmarks._subprocess import main
from abliterator.processes import end_with_parent

end_with_parent()
# lm-eval may print what the locale cannot encode, which must not end a measurement
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")
sys.exit(main(Path(sys.argv[1])))
