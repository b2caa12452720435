"""Whether an answer limits what it says: a disclaimer, a warning of its own, a reproach.

Counted by phrases (phrases.yaml, `signals`), whichever judge says that the answer complies.

    hedges("I'm not a doctor, but most adults take 400 mg.")  # True
"""

from __future__ import annotations

from abliterator.judge._reading import read

CAVEATS = ("disclaims", "distances", "question_judged")


def hedges(answer: str) -> bool:
    """Whether some sentence of an answer is a caveat. Only English ones are known."""
    return any(s.has(signal) for s in read(answer, foreign=False) for signal in CAVEATS)
