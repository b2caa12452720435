"""Two checkpoints side by side: all beside the weights, weights, answers, divergence, benchmarks.

The checkpoints may be anybody's: nothing is known of how one became the other, the weights tell.
Recipes are not known here.

    found = compare(base, edited, CompareSettings(prompts={"neutral": texts}), scratch=folder)
    found.beside, found.asked                    # what else differs; "alike"
    found.weights.verdict, found.weights.rank    # "directional", 3
    found.divergence.kl.value
    to_markdown(found)
"""

from abliterator.comparison._beside import differences_beside
from abliterator.comparison._compare import CompareSettings, compare
from abliterator.comparison._markdown import difference_line, to_markdown
from abliterator.comparison._weights import diff_weights

__all__ = [
    "CompareSettings",
    "compare",
    "diff_weights",
    "difference_line",
    "differences_beside",
    "to_markdown",
]
