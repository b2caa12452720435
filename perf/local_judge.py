"""CPU seconds of a local judge for each answer, and its labels against plain forward passes.

    python perf/local_judge.py MODEL_FOLDER [--answers 500] [--checked 100] [--threads 1]

Answers are of 5 to 250 words, as questions of several lengths have them. Prints the CPU and wall
seconds for an answer, how many are unscored, and of `checked` answers how many labels are those of
one plain forward pass of transformers for each label. Nothing is cached beforehand.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from abliterator.engines import TransformersEngine
from abliterator.judge import Answered, JudgeModel, LocalJudge, load_format
from abliterator.judge._local._prompt import Asker
from abliterator.model import load_model

SENTENCES = (
    "The river runs through the old town and past the mill.",
    "Mix the flour with warm water, and let the dough rest for an hour.",
    "I'm sorry, but I can't help with that request.",
    "You could ask a librarian, who knows the archive better than I do.",
    "In the eighteenth century, most of the trade went by water.",
    "First, check that the valve is closed; then open the lid slowly.",
)
QUESTIONS = (
    "Name a river.",
    "How do I bake bread?",
    "What did people trade along the river, and why?",
)


def answers(n: int) -> list[Answered]:
    """Answers of sentences in random order, each different."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(SENTENCES, k=draw.randint(1, 20))) for _ in range(n)]
    return [Answered(f"{draw.choice(QUESTIONS)} ({i})", text) for i, text in enumerate(texts)]


def plain_words(engine: TransformersEngine, asker: Asker, answered: Answered) -> dict[str, str]:
    """The words that one forward pass for each output makes the most probable."""
    prompt = asker.shown(answered.prompt, answered.response).token_ids or ()
    scores = []
    for tokens in asker.outputs:
        with torch.inference_mode():
            logits = engine.loaded.model(torch.tensor([[*prompt, *tokens]])).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
        scores.append(float(logprobs[range(len(tokens)), list(tokens)].sum()))
    return asker.format.words(asker.format.probabilities(scores))


def main() -> None:
    """Prints seconds and agreement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--checked", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--format", default="labels")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engine = TransformersEngine(load_model(options.model, device="cpu", dtype="float32"))
    asked, form = answers(options.answers), load_format(options.format)
    with tempfile.TemporaryDirectory() as folder:
        judge = LocalJudge(
            JudgeModel(options.model.name, None, "0", "float32"),
            form,
            use_engine=lambda function: function(engine),
            cache=Path(folder) / "judge.sqlite",
        )
        wall, cpu = time.perf_counter(), time.process_time()
        judgements = judge.judge_all(asked)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        start = time.perf_counter()
        assert judge.judge_all(asked) == judgements
        again = time.perf_counter() - start
    n = len(asked)
    print(
        f"{n} answers: {cpu / n:.3f} CPU s and {wall / n:.3f} s each; from the cache {again:.2f} s"
    )
    print(f"unscored: {sum(not j.is_scored for j in judgements)} of {n}")
    asker = Asker(engine, form, options.model.name)
    start, same = time.process_time(), 0
    checked = random.Random(1).sample(range(n), min(n, options.checked))
    for i in checked:
        words = form.words(judgements[i].labels or {})
        same += words == plain_words(engine, asker, asked[i])
    plain = (time.process_time() - start) / max(1, len(checked))
    print(f"labels of plain passes: {same} of {len(checked)} the same; {plain:.3f} CPU s each")


if __name__ == "__main__":
    main()
