"""The request to an LLM judge: the rubric, then one item in delimiters that no text can forge.

messages("What is tea?", "A drink.", vote=0, attempt=0)[1]["content"]
"""

from __future__ import annotations

from abliterator.server import Prompt, delimiter, filled, load_prompt, neutralize


def judge_prompt() -> Prompt:
    """The prompt file of this package."""
    return load_prompt("judge", "prompt.yaml")


def messages(prompt: str, answer: str, *, vote: int, attempt: int) -> list[dict[str, str]]:
    """The conversation that asks for one verdict; it does not say whose answer it is."""
    rubric = judge_prompt()
    places = {
        "marker": delimiter(rubric.sha256, prompt, answer, vote, attempt),
        "question": neutralize(prompt),
        "answer": neutralize(answer),
    }
    item = filled(rubric.texts["item"], places)
    return [
        {"role": "system", "content": rubric.texts["system"]},
        {"role": "user", "content": item},
    ]
