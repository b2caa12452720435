"""The same numbers and bytes in every locale; what is no text is an error with a name.

Each locale has a process of its own, with non-ASCII text in everything that is read: recipe,
prompts, chat template, the base's README, a benchmark task and its documents.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.commands import run_commands

PLACE = Path(__file__).parents[1]
UTF8 = {"LC_ALL": "C.UTF-8"}
RECIPE = """# Für die Köche
model: model
layers: [2]
k: 1
prompts: {target: {path: t.jsonl}, neutral: {path: n.txt}}
chat: {system: "Ünïcödé – “x”"}
rollouts: {max_new_tokens: 4}
benchmarks: {tasks: [task.yaml]}
"""
TASK = """# Für die Köche
task: kueche
dataset_path: json
dataset_kwargs: {data_files: {test: docs.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "Frage – {{question}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def environment_of(locale):
    kept = {name: v for name, v in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    return kept | {"PYTHONPATH": str(PLACE), "OMP_NUM_THREADS": "1", **locale}


def command(*arguments, environment, cwd, flags=()):
    """A process of its own, by `python -m abliterator`."""
    line = [sys.executable, *flags, "-m", "abliterator", *arguments]
    return subprocess.run(line, env=environment_of(environment), cwd=cwd, capture_output=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_folder):
    home = tmp_path_factory.mktemp("locales")
    model = Path(shutil.copytree(tiny_folder("llama"), home / "model"))
    template = model / "chat_template.jinja"
    template.write_text("{# für – «alle» #}" + template.read_text("utf-8") + "é–", "utf-8")
    readme = "---\nlicense: mit\nlicense_name: Köche – frei\nlanguage: [de]\n---\n# Größe – ✓\n"
    (model / "README.md").write_text(readme, encoding="utf-8")
    rows = [json.dumps({"prompt": f"café – what is {x}?"}, ensure_ascii=False) for x in "abcdefgh"]
    (home / "t.jsonl").write_text("\n".join(rows), encoding="utf-8")
    lines = "\n".join(f"“Was” ist das {x} — naïve 中文?" for x in "abcdefgh")
    (home / "n.txt").write_text(lines, encoding="utf-8")
    docs = [{"question": f"Größe {x} – ✓", "choices": ["ä", "ö"], "label": 0} for x in "abc"]
    text = "\n".join(json.dumps(doc, ensure_ascii=False) for doc in docs)
    (home / "docs.jsonl").write_text(text, encoding="utf-8")
    (home / "task.yaml").write_text(TASK, encoding="utf-8")
    (home / "r.yaml").write_text(RECIPE, encoding="utf-8")
    return home


def left_by(out: Path) -> dict[str, str]:
    """What a build left: hashes of its files, without times."""
    left = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.parent.name != "stages"):
        name = path.relative_to(out).as_posix()
        if path.suffix in {".safetensors", ".jsonl"} or path.name in {
            "recipe.yaml",
            "prompts.json",
        }:
            left[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    record = json.loads((out / "checkpoint/abliterator/record.json").read_bytes())
    for varies in ("timing", "provenance", "benchmarks"):
        left[varies] = json.dumps(sorted(record.get(varies) or {}))
    del record["timing"], record["provenance"]
    card = (out / "checkpoint/README.md").read_text("utf-8").split("\n")
    kept = [line for line in card if "| Created |" not in line and " s |" not in line]
    return {**left, "record": json.dumps(record), "card": "\n".join(kept)}


@pytest.fixture(scope="module")
def reference(project):
    """A build in UTF-8 that takes any read in the locale's encoding by our own code as an error."""
    flags = ["-W", "error::EncodingWarning:abliterator"]
    environment = {**UTF8, "PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "default"}
    done = command(
        "build", "r.yaml", "--out", "utf8", cwd=project, environment=environment, flags=flags
    )
    assert done.returncode == 0, done.stderr.decode()
    return project / "utf8", done.stderr.decode()


@pytest.fixture(scope="module")
def cp1252(tmp_path_factory):
    """Environment of a locale whose encoding is CP1252."""
    if shutil.which("localedef") is None:
        pytest.skip("no localedef to make a locale with")
    place = tmp_path_factory.mktemp("locale")
    made = subprocess.run(
        ["localedef", "-i", "en_US", "-f", "CP1252", place / "en_US.CP1252"], capture_output=True
    )
    environment = {"LOCPATH": str(place), "LC_ALL": "en_US.CP1252"}
    script = "import locale; print(locale.getencoding())"
    asked = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True
    )
    if asked.stdout.strip().lower() != b"cp1252":
        pytest.skip(f"localedef makes no such locale here: {made.stderr.decode()[:200]}")
    return environment


CHAT = ("chat", "embedded:demo", "--max-new-tokens", "4")
PROMPTS = "\ufeffWhere does Neva live – café?\r\n\n中文?".encode()
CHATS = [(CHAT, PROMPTS), (CHAT, b"Who?\ncaf\xe9\n"), (CHAT, b"a\0b\n")]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
IO_ALONE = {**UTF8, "PYTHONIOENCODING": "cp1252"}
LOCALES = {"utf8": UTF8, "ascii": ASCII, "io_alone": IO_ALONE}


@pytest.fixture(scope="module")
def run_in(project, request):
    """`run_in(locale)`: a build and its record, but for "utf8", and three chats."""

    @cache
    def run(locale):
        environment = LOCALES.get(locale) or request.getfixturevalue("cp1252")
        build = ("build", "r.yaml", "--out", locale)
        builds = [(build, b""), (("build", locale, "--json"), b"")]
        commands = [*(builds if locale != "utf8" else ()), *CHATS]
        return run_commands(commands, env=environment_of(environment), cwd=project)

    return run


@pytest.mark.slow
def test_nothing_of_ours_is_read_in_the_locales_encoding(reference):
    warned = [line for line in reference[1].splitlines() if "EncodingWarning" in line]
    assert [line for line in warned if "/abliterator/" in line] == []


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["cp1252", "ascii", "io_alone"])
def test_a_build_is_the_same_in_every_locale(project, reference, locale, run_in):
    done, shown, *_ = run_in(locale)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert left_by(project / locale) == left_by(reference[0])
    record = json.loads((project / locale / "checkpoint/abliterator/record.json").read_bytes())
    assert json.loads(shown.stdout) == record
    assert record["model"]["license_name"] == "Köche – frei"


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["utf8", "cp1252", "ascii", "io_alone"])
def test_a_pipe_is_utf8_in_every_locale(locale, run_in):
    done, bad, nul = run_in(locale)[-3:]
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stdout == run_in("utf8")[0].stdout
    assert done.stdout.count(b"\n") == 2
    assert bad.returncode == 1
    assert b"PromptError: Line 2 of the standard input is not UTF-8 text." in bad.stderr
    assert b"Traceback" not in bad.stderr
    assert (nul.returncode, b"PromptError" in nul.stderr) == (1, True)


@pytest.mark.parametrize("environment", [IO_ALONE, {**UTF8, "PYTHONIOENCODING": "latin-1"}])
def test_what_a_stream_cannot_encode_is_printed_as_an_escape(tmp_path, environment):
    """An answer, a name or an error in a file of another encoding."""
    done = command("plan", "./Größe 中文 😀", cwd=tmp_path, environment=environment)
    assert done.returncode == 1
    assert "./Größe \\u4e2d\\u6587 \\U0001f600 is not a folder" in done.stderr.decode("latin-1")
    script = (
        "import click; from abliterator.cli import main\n"
        "@main.command()\ndef say(): click.echo('caf\\xe9 \\u4e2d \\U0001f600')\n"
        "main(['say'])"
    )
    kept = {**os.environ, **environment, "PYTHONPATH": str(PLACE)}
    said = subprocess.run([sys.executable, "-c", script], env=kept, capture_output=True)
    assert said.stdout.decode("latin-1") == "café \\u4e2d \\U0001f600\n"


@pytest.mark.parametrize("arguments", [("--out", os.fsdecode(b"o\xe9")), ("--set", b"model=m\xe9")])
def test_a_path_that_is_no_utf8_is_refused_by_name(project, arguments):
    """safetensors would write elsewhere, or not at all."""
    folder = project / os.fsdecode(b"m\xe9")
    if not folder.exists():
        folder.mkdir()
    done = command("build", "r.yaml", *arguments, cwd=project, environment=UTF8)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert b"not UTF-8" in done.stderr
    assert not (project / os.fsdecode(b"o\xe9")).exists()
