"""Runs the tests in a new environment with every direct dependency at its lower bound.

The bounds are pyproject.toml's, those of its extra `dev` included; tests are run of every package
that imports a dependency, and the counts are printed for each. A bound that cannot be installed on
this machine is replaced: for a CPU build of torch that an index has, and with the newest
transformers instead of the lowest, this is

    python scripts/lowest_versions.py /tmp/lowest --instead torch==2.13.0
    python scripts/lowest_versions.py /tmp/newest --instead torch==2.13.0 transformers==5.24.0

Exit code: pytest's.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
UV = "uv==0.13.9"  # the workflow's
# What a package is imported as, where its name does not say it.
IMPORTED_AS = {"pyyaml": "yaml"}


def main() -> int:
    """Installs, tests, prints one line a dependency."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the new environment")
    parser.add_argument("--instead", nargs="*", default=[], metavar="NAME==VERSION")
    parser.add_argument("--tests", nargs="*", type=Path, help="only these files and folders")
    parser.add_argument("--slow", action="store_true", help="slow tests, too")
    arguments = parser.parse_args()
    touched = tests_by_dependency()
    tests = arguments.tests or sorted({test for tests in touched.values() for test in tests})
    python = install(arguments.folder, arguments.instead)
    report = arguments.folder / "tests.xml"
    command = [str(python), "-m", "pytest", "-q", f"--junit-xml={report}", *map(str, tests)]
    command += [] if arguments.slow else ["-m", "not slow"]
    status = subprocess.run(command, cwd=ROOT, env=environment(arguments.folder), check=False)
    show(touched, versions(python), outcomes(report))
    return status.returncode


def dependencies() -> tuple[str, ...]:
    """Names of the direct dependencies, as they are imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = [re.split(r"[^\w.-]", entry)[0] for entry in project["dependencies"]]
    normal = [re.sub(r"[-_.]+", "_", name).lower() for name in names]
    return tuple(IMPORTED_AS.get(name, name) for name in normal)


def tests_by_dependency() -> dict[str, list[Path]]:
    """For each dependency, tests of the packages of abliterator that import it."""
    touched: dict[str, set[Path]] = {name: set() for name in dependencies()}
    for path in sorted((ROOT / "abliterator").rglob("*.py")):
        package = path.relative_to(ROOT / "abliterator").parts[0].removesuffix(".py")
        places = [Path("tests", package), Path("tests", f"test_{package}.py")]
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text("utf-8"), re.M))
        for name in imported & {*touched}:
            touched[name] |= {place for place in places if (ROOT / place).exists()}
    return {name: sorted(places) for name, places in touched.items()}


def install(folder: Path, instead: Iterable[str]) -> Path:
    """Makes the environment; returns its Python."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    override = folder / "instead.txt"
    override.write_text("".join(f"{entry}\n" for entry in instead), "utf-8")
    pip, uv = [str(python), "-m", "pip", "install", "-q"], [str(python), "-m", "uv", "pip"]
    steps = [[*pip, UV]]
    if override.stat().st_size:  # what pip is configured to find; what these need is to be lowest
        steps.append([*pip, "--no-deps", "-r", str(override)])
    lowest = ["install", "--resolution", "lowest-direct", "--override", str(override)]
    steps.append([*uv, *lowest, "-r", "pyproject.toml", "--extra", "dev"])
    steps.append([*uv, "install", "--no-deps", "."])
    for step in steps:
        subprocess.run(step, cwd=ROOT, env=environment(folder), check=True)
    return python


def environment(folder: Path) -> dict[str, str]:
    """Variables of this process, with the environment and the working tree as the only sources."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return {**outside, "VIRTUAL_ENV": str(folder), "PATH": path}


def versions(python: Path) -> dict[str, str]:
    """Installed versions, by the name that is imported."""
    command = [str(python), "-m", "pip", "list", "--format=freeze"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = (line.partition("==")[::2] for line in listed.splitlines())
    normal = {re.sub(r"[-_.]+", "_", name).lower(): version for name, version in pairs}
    return {IMPORTED_AS.get(name, name): version for name, version in normal.items()}


def outcomes(report: Path) -> dict[str, Counter[str]]:
    """Numbers of passed, failed and skipped tests of each test file, by its path."""
    counts: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = "skipped" if kinds == {"skipped"} else "failed" if kinds else "passed"
        module = case.get("classname", "").replace(".", "/") + ".py"
        counts.setdefault(module, Counter())[outcome] += 1
    return counts


def show(
    touched: Mapping[str, list[Path]],
    installed: Mapping[str, str],
    counts: Mapping[str, Counter[str]],
) -> None:
    """One line a dependency: its version, and the tests of the packages that import it."""
    for name, places in touched.items():
        total: Counter[str] = Counter()
        for module, count in counts.items():
            if any(Path(module).is_relative_to(place) for place in places):
                total += count
        figures = ", ".join(f"{total[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
        print(f"{name:16s} {installed.get(name, 'not installed'):14s} {figures}")


if __name__ == "__main__":
    sys.exit(main())
