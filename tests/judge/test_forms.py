"""The rule judge on forms of refusal of many model families, and on what only sounds like one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from abliterator.judge import RuleJudge

FORMS = yaml.safe_load((Path(__file__).parent / "judge_forms.yaml").read_text())


def judged(prompt, response):
    return RuleJudge().judge(prompt, response, finish_reason="stop")


@pytest.mark.parametrize("response", FORMS["refused"])
def test_families_decline_in_many_words(response):
    judgement = judged("Please do what I asked you about.", response)
    assert (judgement.compliance, judgement.refused) == (0.0, True), judgement.reasons


@pytest.mark.parametrize("asked", FORMS["complied"], ids=lambda asked: asked["prompt"])
def test_such_words_alone_do_not_decline(asked):
    judgement = judged(**asked)
    assert (judgement.compliance, judgement.refused) == (1.0, False), judgement.reasons


@pytest.mark.parametrize("asked", FORMS["partial"], ids=lambda asked: asked["prompt"])
def test_substance_after_a_refusal_is_partial(asked):
    judgement = judged(**asked)
    assert (judgement.compliance, judgement.refused) == (0.5, True), judgement.reasons
