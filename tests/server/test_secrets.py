"""A key is masked in whatever a server says, in each of its forms; other texts stay."""

from __future__ import annotations

import base64

import pytest

from abliterator.recipe import JudgeSettings
from abliterator.server._secrets import redacted

KEY = "sk-Quite0Secret9TestKey"


def echoes():
    data = KEY.encode()
    yield KEY
    for before in (b"", b"u", b"u:", b"user:"):
        yield base64.b64encode(before + data).decode()
        yield base64.urlsafe_b64encode(before + data + b":p").decode()
    yield data.hex()
    yield data.hex().upper()
    yield KEY[::-1]
    yield KEY[4:]
    yield KEY[:15]


@pytest.mark.parametrize("echo", list(echoes()))
def test_a_key_in_other_letters_is_masked(echo, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    settings = JudgeSettings(kind="openai", api_key_env="JUDGE_KEY")
    shown = redacted(f"served by m-{echo}!", settings)
    assert shown.startswith("served by m-")
    assert shown.endswith("!")
    assert "[key]" in shown
    kept = shown.removeprefix("served by m-").replace("[key]", "")
    assert len(kept) <= 12


@pytest.mark.parametrize("text", ["", "gpt-oss-120b", "sk-Quite", "fp_44709d6fcb", "é\u2028" * 40])
def test_other_texts_are_left_alone(text, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    assert redacted(text, JudgeSettings(kind="openai", api_key_env="JUDGE_KEY")) == text
