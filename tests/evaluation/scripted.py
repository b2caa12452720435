"""A tiny model that thinks and answers by script, in the format of any reply of tests.thinking."""

from __future__ import annotations

from dataclasses import dataclass, field

from abliterator.anatomy import anatomy_of
from abliterator.bake import plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.engines import AnswerPath, TransformersEngine
from abliterator.evaluation import EvaluationContext, RenderedPrompts
from abliterator.judge import RuleJudge
from abliterator.recipe import Edit
from abliterator.selection import KL_TOKENS
from abliterator.thinking import Splitter
from tests.engines.seams import answer_of
from tests.thinking.replies import OPENED, REPLIES, THOUGHT, ids, load_tiny, prompt_ids

LIMIT = 150  # tokens of an answer; a whole reply has fewer, a long thought more
LONG = THOUGHT * 12
NAMES = ("think, as words", "think, as tokens", "gpt-oss", "Magistral", "Granite", "Hunyuan")


@dataclass(frozen=True)
class Scripted(TransformersEngine):
    """A tiny model that answers by script; its distributions are its own.

    Attributes:
        replies: what it says after a prompt, thinking and all, by the prompt's token ids.
        asked: prompts of each call of `answers`.
    """

    replies: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    asked: list[list[tuple[int, ...]]] = field(default_factory=list)

    def answers(self, prompts, *, max_new_tokens, batch_size, **_):
        self.asked.append([tuple(prompt) for prompt in prompts])
        return [self._answer(tuple(prompt), max_new_tokens) for prompt in prompts]

    def _answer(self, prompt, max_new_tokens):
        """Goes on where the prompt ends, be it within a reply."""
        (whole,) = (
            (*begun, *reply)
            for begun, reply in self.replies.items()
            if prompt[: len(begun)] == begun and (*begun, *reply)[: len(prompt)] == prompt
        )
        row = [*whole[len(prompt) :], 2][:max_new_tokens]
        return answer_of(Splitter(self.tokenizer), prompt, row, [2])


def scripted(folder, name):
    """A tiny Llama with the tokenizer of a format, and nothing to say yet."""
    return Scripted(load_tiny(folder, name))


def told(engine, name, replies, *, by_prompt=False):
    """Prompts that get these replies: (thought or None, answer) by question."""
    reply = REPLIES[name]
    opened = OPENED.get(name, reply.before) if by_prompt else ""
    prompts = RenderedPrompts([], [])
    for question, (thought, answer) in replies.items():
        prompt = tuple(prompt_ids(engine.tokenizer, opened, asked=question))
        text = answer
        if thought is not None:
            text = reply.before + thought + reply.between + answer + reply.after
        engine.replies[prompt] = ids(engine.tokenizer, text.removeprefix(opened))
        prompts.prompts.append(question)
        prompts.token_ids.append(prompt)
    return prompts


def context_of(engine, target, neutral):
    checkpoint = Checkpoint.open(engine.loaded.folder)
    return EvaluationContext(
        engine=engine,
        plan=plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit()),
        target=target,
        neutral=neutral,
        judge=RuleJudge(),
        max_new_tokens=LIMIT,
        kl_tokens=KL_TOKENS,
        batch_size=4,
        max_batch_tokens=512,
    )


def assert_behind(engine, extended, prompt, answer):
    """The prompt goes on with its reply, up to the answer and no further."""
    whole = (*prompt, *engine.replies[tuple(prompt)])
    assert extended == whole[: len(extended)]
    rest = engine.tokenizer.decode(whole[len(extended) :], skip_special_tokens=True)
    assert rest.startswith(answer)
    assert THOUGHT in engine.tokenizer.decode(extended)


def paths_of_answers(engine, prompts, tokens):
    """The first tokens of each answer, and one position more: what comes next."""
    answers = engine.answers(prompts, max_new_tokens=tokens - 1, batch_size=4)
    return [
        AnswerPath((*prompt, *answer.token_ids), len(answer.token_ids) + 1)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
