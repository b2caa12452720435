"""A judge that is an open model in this process: of the allowed outputs the most probable counts.

`_format` reads what a model is shown and may write, from data; `_prompt` makes token ids of it;
`_judge` asks the model and keeps its log-probabilities.
"""

from abliterator.judge._local._format import FORMATS, Format, format_of, load_format
from abliterator.judge._local._judge import JudgeModel, LocalJudge

__all__ = ["FORMATS", "Format", "JudgeModel", "LocalJudge", "format_of", "load_format"]
