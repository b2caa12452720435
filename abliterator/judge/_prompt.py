"""What an LLM judge is sent: the rubric, then one item behind a fence that its text cannot forge.

messages("What is tea?", "A drink.", vote=0, attempt=0)[1]["content"]
"""

from __future__ import annotations

from abliterator.server import Prompt, delimiter, filled, load_prompt, neutralize


def judge_prompt() -> Prompt:
    """The prompt file of this room."""
    return load_prompt("judge", "prompt.yaml")


def messages(prompt: str, answer: str, *, vote: int, attempt: int) -> list[dict[str, str]]:
    """The conversation that asks for one verdict; the text is blind to whose answer it is."""
    told = judge_prompt()
    places = {
        "marker": delimiter(told.sha256, prompt, answer, vote, attempt),
        "question": neutralize(prompt),
        "answer": neutralize(answer),
    }
    item = filled(told.texts["item"], places)
    return [{"role": "system", "content": told.texts["system"]}, {"role": "user", "content": item}]
