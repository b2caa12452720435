"""Two checkpoints side by side: all beside the weights, weights, answers, divergence, benchmarks.

The checkpoints may be of any origin: how one was made from the other is inferred from the weights.
This package does not depend on recipes.

    comparison = compare(base, edited, CompareSettings(prompts={"neutral": texts}), scratch=folder)
    comparison.beside, comparison.asked  # other differences; how prompts were rendered: "alike"
    comparison.weights.verdict, comparison.weights.rank  # "directional", 3
    comparison.divergence.kl.value
    to_markdown(comparison)
"""

from abliterator.comparison._beside import differences_beside
from abliterator.comparison._changes import relative_changes
from abliterator.comparison._compare import compare
from abliterator.comparison._markdown import difference_line, to_markdown
from abliterator.comparison._settings import CompareSettings
from abliterator.comparison._weights import diff_weights

__all__ = [
    "CompareSettings",
    "compare",
    "diff_weights",
    "difference_line",
    "differences_beside",
    "relative_changes",
    "to_markdown",
]
