"""Contrast pairs made with a loopback server that writes, sorts, repeats itself and fails."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterator.errors import PairsError
from abliterator.pairs import WORDS, Candidate, save_pairs
from abliterator.pairs._filter import PairFilter, similarity, trigrams
from abliterator.pairs._questions import (
    pairs_prompt,
    sorting_request,
)
from abliterator.prompts import load_prompts, normalised
from abliterator.recipe import Source, load_recipe
from tests.helpers.judge_server import JudgeServer
from tests.pairs.scripted import (
    CATEGORY,
    REQUEST,
    is_check,
    made,
    pair,
    sorted_by_its_verb,
    spec,
    well,
)

# A whole run


def test_the_categories_are_equal_and_every_pair_is_checked(tmp_path):
    with JudgeServer(reply=well) as server:
        found = made(spec(server, per_call=5), tmp_path)
    assert {name: len(of_it) for name, of_it in found.pairs.items()} == dict.fromkeys(
        ("home", "garden", "road"), 8
    )
    texts = [text for of_it in found.pairs.values() for one in of_it for text in one]
    assert len(set(map(normalised, texts))) == 48
    checked = [REQUEST.search(b["messages"][1]["content"])[2] for b in server.bodies if is_check(b)]
    assert sorted(checked) == sorted(texts)  # each once, and nothing beside
    assert found.calls == len(server.bodies) == 48 + 3 * 2
    assert (found.served, found.dropped) == (("judge-served",), {})


def test_a_checker_is_not_told_which_side_it_sees():
    """All requests are asked about in the same words."""
    asked = [
        sorting_request(spec("http://x"), text, attempt=0).messages for text in ("One.", "Two.")
    ]
    assert asked[0][0] == asked[1][0]
    plain = [re.sub("#[0-9a-f]{16}", "#", m[1]["content"]) for m in asked]
    assert plain[0].replace("One.", "Two.") == plain[1]


def test_the_file_is_two_sources_of_a_recipe(tmp_path):
    path = tmp_path / "pairs.jsonl"
    with JudgeServer(reply=well) as server:
        asked = spec(server)
        found = made(asked, tmp_path)
    save_pairs(path, found, asked, WORDS)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == {
        "prompt": pair("home", 0)["target"],
        "side": "target",
        "pair": 0,
        "category": "home",
        "words": 6,
        "tokenizer": None,
        "model": "small",
        "served_model": "judge-served",
        "prompt_version": "1",
        "prompt_sha256": pairs_prompt().sha256,
        "spec_sha256": asked.digest,
    }
    assert [row["category"] for row in rows[::2]] == ["home", "garden", "road"] * 8
    assert [row["pair"] for row in rows] == [i // 2 for i in range(48)]
    (tmp_path / "r.yaml").write_text(
        "model: m\nlayers: [1]\nk: 1\nprompts:\n"
        "  target: {path: pairs.jsonl, where: {side: target}}\n"
        "  contrast: {path: pairs.jsonl, where: {side: contrast}}\n"
    )
    prompts = load_recipe(tmp_path / "r.yaml").prompts
    for side, source in (("target", prompts.target), ("contrast", prompts.contrast)):
        read = load_prompts(side, Source(path=source.path, where=source.where))
        assert read.prompts == tuple(row["prompt"] for row in rows if row["side"] == side)


FAULTS = {
    "429": 0.05,
    "500": 0.05,
    "drop": 0.03,
    "malformed": 0.03,
    "fenced": 0.03,
    "blank": 0.03,
    "html": 0.02,
    "content_filter": 0.02,
}


def test_faults_change_nothing(tmp_path):
    with JudgeServer(reply=well) as calm:
        expected = made(spec(calm, per_category=16), tmp_path, "calm")
    with JudgeServer(reply=well, faults=FAULTS) as server:
        found = made(spec(server, per_category=16, server_more={"retries": 6}), tmp_path)
    assert sum(server.calls[fault] for fault in FAULTS) > 10
    assert found.pairs == expected.pairs


def test_a_second_run_asks_for_nothing(tmp_path):
    with JudgeServer(reply=well) as server:
        first = made(spec(server), tmp_path)
        asked = len(server.bodies)
        assert made(spec(server), tmp_path) == first
    assert len(server.bodies) == asked


MAKING = """
import json, sys
from pathlib import Path
from abliterator.pairs import WORDS, make_pairs
from tests.pairs.scripted import spec
print("ready", flush=True)
print(json.dumps(make_pairs(spec(sys.argv[1], per_category=30, server_more={"concurrency": 4}),
                            cache=Path(sys.argv[2]), length=WORDS).pairs))
"""


@pytest.mark.slow
def test_killed_five_times_it_repeats_only_what_was_in_flight(tmp_path):
    with JudgeServer(reply=well, latency=0.03) as server:
        command = [sys.executable, "-c", MAKING, server.url, str(tmp_path / "p.sqlite")]
        for kill in range(5):
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert process.stdout.readline() == b"ready\n"
            goal = len(server.bodies) + 5 + 7 * (kill % 3)
            while len(server.bodies) < goal and process.poll() is None:
                time.sleep(0.005)
            assert process.poll() is None, "it ended before it could be killed"
            process.send_signal(signal.SIGKILL)
            process.communicate()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        asked = [body["messages"][1]["content"] for body in server.bodies]
        undisturbed = made(spec(server, per_category=30), tmp_path, "undisturbed")
    resumed = json.loads(done.stdout.splitlines()[-1])
    assert resumed == json.loads(json.dumps(undisturbed.pairs))
    assert len(asked) - len(set(asked)) <= 5 * 4


# What is dropped


def test_every_flaw_is_dropped_and_counted(tmp_path):
    def untidy(body):
        if is_check(body):
            return sorted_by_its_verb(body)
        user = body["messages"][1]["content"]
        category, n = CATEGORY.search(user)[1], user.count("\n- ")
        good = pair(category, n)
        told = [
            good,
            good,
            {"target": good["target"].upper(), "contrast": "Do explain what else there is."},
            {"target": good["target"] + " Now?", "contrast": pair(category, n + 70)["contrast"]},
            {"target": "Do fetch it.", "contrast": "Do explain how it is to be fetched by you."},
            {"target": "Explain the same.", "contrast": "explain  the same."},
            {"target": "Do bring it, " + category, "contrast": "Do explain it, " + category},
            {"target": "Half a pair."},
            {"target": " ", "contrast": "Nothing."},
            "no pair",
            pair(category, n + 1),
        ]
        return json.dumps({"pairs": told})

    with JudgeServer(reply=untidy) as server:
        found = made(spec(server, per_category=2), tmp_path)
    for name, of_it in found.pairs.items():
        assert [one._asdict() for one in of_it] == [pair(name, 0), pair(name, 1)]
    assert found.dropped == {
        "duplicate": 6,
        "near duplicate": 3,
        "the lengths differ": 3,
        "the two sides are the same": 3,
        "its target is not what it should be": 3,
    }


def test_a_model_that_repeats_itself_ends_with_an_error(tmp_path):
    def again(body):
        if is_check(body):
            return sorted_by_its_verb(body)
        category = CATEGORY.search(body["messages"][1]["content"])[1]
        return json.dumps({"pairs": [pair(category, i) for i in range(3)]})

    with (
        JudgeServer(reply=again) as server,
        pytest.raises(PairsError, match=r"'home' has 3 of 8 pairs, and 2 calls.*6 x duplicate"),
    ):
        made(spec(server, patience=2), tmp_path)
    assert len(server.bodies) == 3 * 3 * 2 + 3 * 3


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("I would rather not.", "no reply with pairs"),
        ('{"pairs": []}', "no reply with pairs"),
        ('{"label": "neither", "pairs": [{"target": "a b", "contrast": "c d"}]}', "is not what"),
    ],
)
def test_a_model_that_is_of_no_use_ends_with_an_error(answer, said, tmp_path):
    with JudgeServer(reply=answer) as server, pytest.raises(PairsError, match=said):
        made(spec(server, patience=2, server_more={"retries": 1}), tmp_path)
    assert len(server.bodies) <= 2 * 3 * 2 + 6


def test_a_pair_without_a_label_is_dropped(tmp_path):
    """What cannot be checked is not kept, and not the end either."""
    odd = pair("home", 1)["contrast"]

    def mute(body):
        return "Well." if is_check(body) and odd in body["messages"][1]["content"] else well(body)

    with JudgeServer(reply=mute) as server:
        found = made(spec(server), tmp_path)
    assert odd not in [one.contrast for one in found.pairs["home"]]
    assert found.dropped["its contrast is not what it should be"] == 1


def pair_filter(**more):
    return PairFilter(WORDS, **{"length_gap": 2, "near_duplicate": 0.6, **more})


def test_near_duplicates_are_of_one_side():
    """The sides of a pair are alike on purpose."""
    one = pair_filter()
    assert (
        one.rejection_reason(Candidate("Set an alarm for seven.", "Explain an alarm clock."))
        is None
    )
    near = Candidate("Set an alarm for eleven.", "Describe the old bells.")
    assert one.rejection_reason(near) == "near duplicate"
    assert pair_filter(near_duplicate=0.95).rejection_reason(near) is None
    assert one.rejection_reason(Candidate("Explain this alarm clock?", "Boil rice.")) is None
    assert one.rejection_reason(Candidate("Explain  THIS alarm clock.", "Fry it.")) == "duplicate"


@given(*[st.text(alphabet="abc ", max_size=12)] * 2)
def test_similarity_by_hand(one, other):
    def grams(text):
        text = f"  {' '.join(text.split())} "
        return {text[i : i + 3] for i in range(len(text) - 2)}

    both, either = grams(one) & grams(other), grams(one) | grams(other)
    assert similarity(trigrams(one), trigrams(other)) == len(both) / len(either)
