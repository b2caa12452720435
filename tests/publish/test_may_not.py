"""What may not be published, and what is not written to."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from abliterator.errors import PublishError
from abliterator.publish import Target, plan_adapter, plan_publish
from abliterator.publish._load_check import check_loads
from abliterator.record import RunRecord
from abliterator.verification import RECORD, recipe_text
from tests.publish.conftest import (
    NAME,
    commits,
    edit_record,
    files_of,
    on_hub,
)


def test_nothing_is_published_of_what_does_not_verify(hub, out, publish):
    path = next((out / "checkpoint").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    error = publish(public=True)["error"]
    assert "does not verify" in error
    assert hub.requests == []


def test_a_file_added_by_hand_is_named_and_stays(hub, built, out, publish):
    (out / "checkpoint" / "notes.txt").write_text("private")
    (out / "checkpoint" / ".env").write_text("private")
    plan = plan_publish(built[0], out / "checkpoint", Target(NAME))
    assert plan.left_out == (".env", "notes.txt")
    assert not {"notes.txt", ".env"} & set(publish()["uploaded"])
    assert b"private" not in b"".join(on_hub(hub).values())


def test_pictures_go_along_if_the_record_vouches_for_them(built, out):
    picture = out / "checkpoint" / "abliterator" / "sweep.png"
    picture.write_bytes(b"drawn")
    plan = plan_publish(built[0], out / "checkpoint", Target(NAME))
    assert plan.left_out == ("abliterator/sweep.png",)
    path = out / "checkpoint" / "abliterator" / "record.json"
    record = json.loads(path.read_text())
    record["pictures"] = {"abliterator/sweep.png": hashlib.sha256(b"drawn").hexdigest()}
    path.write_text(json.dumps(record))
    plan = plan_publish(built[0], out / "checkpoint", Target(NAME))
    assert plan.left_out == ()
    assert "abliterator/sweep.png" in {file.path for file in plan.files}
    for damage in (lambda: picture.write_bytes(b"another"), picture.unlink):
        damage()
        with pytest.raises(PublishError, match=r"sweep\.png is not the picture"):
            plan_publish(built[0], out / "checkpoint", Target(NAME))


def test_directions_go_along_as_the_record_vouches_for_them(built, out):
    file = out / "checkpoint" / "abliterator" / "directions.safetensors"
    plan = plan_publish(built[0], out / "checkpoint", Target(NAME))
    assert "abliterator/directions.safetensors" in {file.path for file in plan.files}
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    for damage in (lambda: file.write_bytes(data), file.unlink):
        damage()
        with pytest.raises(PublishError, match=r"directions\.safetensors is not the file that"):
            plan_publish(built[0], out / "checkpoint", Target(NAME))


@pytest.mark.parametrize("name", ["README.md", "recipe.yaml", "abliterator/record.json"])
def test_a_build_that_did_not_end(built, out, name):
    (out / "checkpoint" / name).unlink()
    with pytest.raises(PublishError, match=name):
        plan_publish(built[0], out / "checkpoint", Target(NAME))


@pytest.mark.slow
def test_a_checkpoint_that_does_not_load(built, out):
    plan = plan_publish(built[0], out / "checkpoint", Target(NAME))
    check_loads(plan)
    (config,) = (file for file in plan.files if file.path == "config.json")
    other = config.content.replace(b'"intermediate_size": 48', b'"intermediate_size": 40')
    changed = config.model_copy(update={"content": other})
    with pytest.raises(PublishError, match="Plain transformers") as refused:
        check_loads(replace(plan, files=(*plan.files, changed)))
    assert "abliterator-load-" not in str(refused.value)  # a folder that is gone by then
    # what lies in the folder by then is not what is sent
    (out / "checkpoint" / "config.json").write_bytes(other)
    check_loads(plan)


@pytest.mark.parametrize("damage", ["old card", "edited card", "old recipe", "other version"])
def test_a_card_that_is_not_the_records(built, out, damage):
    """As a run leaves it that was killed between record and card."""
    checkpoint = out / "checkpoint"
    record = json.loads((checkpoint / RECORD).read_text())
    expected = "run `abliterator card` again"
    if damage == "old card":
        record["recipe"]["rollouts"]["limit"] = 99
        (checkpoint / "recipe.yaml").write_text(recipe_text(RunRecord.model_validate(record)))
    elif damage == "edited card":
        (checkpoint / "README.md").write_text((checkpoint / "README.md").read_text() + "\n")
    elif damage == "old recipe":
        (checkpoint / "recipe.yaml").write_text("model: another\n")
        expected = "is not the recipe of"
    else:
        record["tool"]["version"] = "0.0.1"
        record["recipe"]["seed"] = 7
        (checkpoint / "recipe.yaml").write_text(recipe_text(RunRecord.model_validate(record)))
        expected = r"0\.0\.1 made: run `abliterator card` again with this version"
    (checkpoint / RECORD).write_text(json.dumps(record))
    with pytest.raises(PublishError, match=expected):
        plan_publish(built[0], checkpoint, Target(NAME))


def test_an_adapter_whose_card_is_not_the_records(built, out):
    plan = plan_publish(built[0], out / "checkpoint", Target(NAME))
    card = out / "adapter" / "README.md"
    card.write_text(card.read_text().replace("apache-2.0", "mit"))
    with pytest.raises(PublishError, match="is not the card"):
        plan_adapter(plan, out / "adapter", Target("somebody/adapter"))


def test_a_base_whose_card_was_changed(built, out, tmp_path):
    """The record states the licence that the base's card had."""
    base = Path(shutil.copytree(built[0], tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(PublishError, match="states its licence"):
        plan_publish(base, out / "checkpoint", Target(NAME))


def test_an_unknown_licence_must_be_given(hub, built, out, publish):
    edit_record(out, license=None)
    readme = out / "checkpoint" / "README.md"
    assert "--license" in publish()["error"]
    assert hub.requests == []
    publish(license="mit")
    card = ModelCard(on_hub(hub)["README.md"].decode())
    assert card.data.license == "mit"
    assert card.text.strip() == ModelCard(readme.read_text()).text.strip()


def test_a_known_licence_is_not_changed(built, out):
    with pytest.raises(PublishError, match="cannot be given another one"):
        plan_publish(built[0], out / "checkpoint", Target(NAME, license="mit"))
    plan_publish(built[0], out / "checkpoint", Target(NAME, license="apache-2.0"))


@pytest.mark.parametrize("license_id", ["llama3.2", "llama3", "llama4"])
def test_a_llama_is_called_so(built, out, license_id):
    edit_record(out, license=license_id)
    with pytest.raises(PublishError, match="--repo-id somebody/Llama-tiny"):
        plan_publish(built[0], out / "checkpoint", Target(NAME))
    plan_publish(built[0], out / "checkpoint", Target("somebody/Llama-3.2-tiny"))


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "../up", "me/x--y", "me/.git\n", "x" * 97])
def test_names_that_are_none(built, name):
    with pytest.raises(PublishError, match="no name for a repository"):
        plan_publish(built[0], built[1] / "checkpoint", Target(name))


def test_a_repository_of_somebody_elses_files(hub, out, publish):
    hub.commit("model", NAME, {"config.json": b"theirs", "thesis.pdf": b"theirs"})
    hub.repo("model", NAME).private = True
    assert "(config.json, thesis.pdf)" in publish()["error"]
    assert "thesis.pdf" in publish(revision="new")["error"]
    assert list(hub.repo("model", NAME).refs) == ["main"]
    assert commits(hub) == 0
    publish(into_existing=True)
    assert on_hub(hub) == {**files_of(out / "checkpoint"), "thesis.pdf": b"theirs"}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "adapter_config.json"])
def test_a_repository_that_would_load_as_another_model(hub, publish, name):
    """Ours is in shards and has no such file: a loader would take theirs."""
    hub.commit("model", NAME, {name: b"theirs"})
    hub.repo("model", NAME).private = True
    error = publish(into_existing=True)["error"]
    assert f"({name})" in error
    assert "another model" in error
    assert commits(hub) == 0


def test_a_branch_with_somebody_elses_files(hub, publish):
    publish()
    hub.commit("model", NAME, {"thesis.pdf": b"theirs"}, ref="drafts")
    assert "thesis.pdf" in publish(revision="drafts")["error"]
    assert publish(revision="other")["uploaded"] == []


def test_a_pull_request_to_a_public_repository(hub, out, publish):
    publish(public=True)
    readme = out / "checkpoint" / "README.md"
    edit_record(out, languages=["cy"])
    assert "--into-existing" in publish(create_pr=True)["error"]
    assert publish(create_pr=True, into_existing=True)["uploaded"] == ["README.md", RECORD]
    assert on_hub(hub)["README.md"] != readme.read_bytes()


def test_a_public_repository_is_not_written_to_unasked(hub, publish):
    publish(public=True)
    assert "is public" in publish()["error"]


def test_new_contents_are_not_shown_before_they_are_checked(hub, out, publish):
    publish(public=True)
    edit_record(out, languages=["cy"])
    assert "before they are checked" in publish(public=True)["error"]
    assert commits(hub) == 1
    assert publish(public=True, into_existing=True)["uploaded"] == ["README.md", RECORD]
