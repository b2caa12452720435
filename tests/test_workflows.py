"""The public CI: pinned, few permissions, on the Pythons of pyproject.toml, and runnable here."""

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPT = ROOT / "scripts" / "run_workflow.py"


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_keep_no_credentials(path):
    text = path.read_text("utf-8")
    actions = re.findall(r"uses: (.*)", text)
    assert actions
    for action in actions:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    for job in yaml.safe_load(text)["jobs"].values():
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
    assert "secrets." not in text


def test_nothing_may_be_written_but_the_proof_for_pypi():
    assert workflow("ci.yml")["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in workflow("ci.yml")["jobs"].values())
    release = workflow("release.yml")
    assert release["permissions"] == {}
    granted = {name: job.get("permissions") for name, job in release["jobs"].items()}
    assert granted == {
        "build": {"contents": "read"},
        "try": None,
        "publish": {"id-token": "write"},
    }


def test_what_is_published_was_built_and_tried_and_has_a_tag():
    jobs = workflow("release.yml")["jobs"]
    assert (jobs["publish"]["needs"], jobs["try"]["needs"]) == ("try", "build")
    assert jobs["publish"]["if"] == "github.ref_type == 'tag'"
    assert all("run" not in step for step in jobs["publish"]["steps"])


def test_ci_runs_on_the_pythons_of_the_classifiers():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    matrix = workflow("ci.yml")["jobs"]["tests"]["strategy"]["matrix"]
    stated = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert set(stated) <= set(matrix["python"])
    lowest = [entry for entry in matrix["include"] if entry["resolution"] == "lowest-direct"]
    assert [entry["os"] for entry in lowest] == matrix["os"]
    assert {f">={entry['python']}" for entry in lowest} == {project["requires-python"]}


def test_the_bug_report_asks_for_doctor():
    template = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text("utf-8"))
    (field,) = [field for field in template["body"] if field["id"] == "doctor"]
    assert field["attributes"]["label"] == "abliterator doctor"
    assert field["validations"]["required"] is True


STEPS = """
jobs:
  first:
    steps:
      - uses: actions/checkout@v1
      - name: Python
        run: |
          python -c "import sys; assert sys.prefix != sys.base_prefix; print('in', sys.prefix)"
          echo "${{ matrix.system }} $VALUE $OWN ${EMPTY-unset}"
        env: {VALUE: "of ${{ matrix.system }}", OWN: step, EMPTY: step}
      - name: Tagged
        if: github.ref_type == 'tag'
        run: exit 9
      - name: Long
        run: exit 8
      - name: Failing
        run: |
          false | true
          echo not reached
"""


@pytest.mark.skipif(sys.platform == "win32", reason="steps for Linux")
def test_steps_of_a_job_run_in_an_empty_environment(tmp_path, monkeypatch):
    (tmp_path / "w.yml").write_text(STEPS)
    monkeypatch.setenv("OWN", "machine")
    monkeypatch.setenv("EMPTY", "")
    done = subprocess.run(
        [sys.executable, SCRIPT, "w.yml", "first", "--set", "system=linux", "--skip", "Long"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "linux of linux machine unset" in done.stdout
    assert "== left to the machine: actions/checkout@v1" in done.stdout
    assert "== skipped: Tagged" in done.stdout
    assert "== skipped: Long" in done.stdout
    assert "not reached" not in done.stdout


def test_every_direct_dependency_has_tests_that_its_lower_bound_is_tried_with():
    found = runpy.run_path(str(ROOT / "scripts" / "lowest_versions.py"))
    touched = found["tests_by_dependency"]()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert len(touched) == len(project["dependencies"])
    assert {name for name, tests in touched.items() if not tests} == set()
    assert "tests/statistics" in {path.as_posix() for path in touched["scipy"]}
