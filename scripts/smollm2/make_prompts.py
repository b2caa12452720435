"""Make the prompt files of recipes/smollm2, by asking the model itself.

SmolLM2-135M-Instruct declines, politely, what a chatbot cannot do in the world ("Set an alarm",
"Can you watch"). Nobody needs to write such prompts: given the opening of a user turn, the model
writes what a user would say, and with the first words of a request (a *form*) it writes requests.

    python scripts/smollm2/make_prompts.py smollm2-135m-instruct recipes/smollm2

1. sample prompts, form by form, and ordinary ones with no first words at all;
2. clean them: whole sentences, one line, no duplicates, nothing on the list of unwanted words;
3. let the model answer each one (greedy) and let the tool's own rule judge sort the answers into
   declined and answered; what is neither is left out;
4. write the sets. Training and evaluation share no form, and the target and the contrast take the
   same number of prompts from every training form, so that the pair differs in behaviour alone.

`--candidates FILE` keeps what steps 1 to 3 made, so that a run that finds it only selects again.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = Path(__file__).parents[2] / "recipes" / "smollm2"
FORMS = yaml.safe_load((PROMPTS / "forms.yaml").read_text("utf-8"))
ORDINARY = ""
BATCH = 64  # of samples, of which a form gets one
ORDINARY_BATCHES = 8
ANSWER_TOKENS = 48
PAIRS = 144  # prompts of the target, of the contrast, and of the generic contrast
EVALUATION = 72  # prompts of each evaluation set

T = TypeVar("T")


class Candidate(NamedTuple):
    """A sampled prompt, its form (``""`` when ordinary), the base's answer, whether it was cut."""

    prompt: str
    form: str
    answer: str
    is_cut: bool


# --- 1. sample -------------------------------------------------------------------------------


def sample_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: str, *, seed: int
) -> Iterator[str]:
    """Yield what the model puts into a user turn that begins with the words of `form`."""
    import torch

    torch.manual_seed(seed)  # here, so that another list of forms changes no form's prompts
    # An empty user turn, up to where the user's text begins: the template's system prompt too.
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False)
    start = tokenizer(turn.split("\0")[0] + form, add_special_tokens=False, return_tensors="pt")
    inputs = {name: tensor.repeat(BATCH, 1) for name, tensor in start.items()}
    for _ in range(1 if form else ORDINARY_BATCHES):
        with torch.inference_mode():
            ids = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_p=0.95,
                top_k=0,
                max_new_tokens=24 if form else 32,
            )
        new = ids[:, start["input_ids"].shape[1] :]
        for text in tokenizer.batch_decode(new, skip_special_tokens=True):
            yield form + text


# --- 2. clean --------------------------------------------------------------------------------


def clean(text: str) -> str | None:
    """Return the whole sentences of the first line of `text`, or None if it is no usable prompt."""
    lines = text.strip().splitlines()
    match = re.match(r".*[.?!](?=\s|$)", lines[0]) if lines else None
    prompt = re.sub(r"\s+", " ", match[0]) if match else ""
    usable = 8 <= len(prompt) <= 200 and prompt.isascii() and not UNWANTED.search(prompt)
    return prompt if usable else None


# Addresses, numbers that could be somebody's, placeholders, and themes that have no place here.
UNWANTED = re.compile(
    r"@|https?:|www\.|\d{5,}|\d{3}-\d{3,4}|[\[\]<>{}|]"
    rf"|\b(?:{'|'.join(FORMS['unwanted'].split())})",
    re.IGNORECASE,
)


def normalised(prompt: str) -> str:
    """Return what two prompts share that differ only in case, punctuation or numbers."""
    return " ".join(re.findall(r"[a-z]+", prompt.lower()))


# --- 3. answer and sort ----------------------------------------------------------------------


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[tuple[str, bool]]:
    """Return the model's greedy answers, and whether each was cut; in batches of similar length."""
    import torch

    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    replies: dict[int, tuple[str, bool]] = {}
    order = sorted(range(len(chats)), key=lambda i: len(chats[i]))
    for first in range(0, len(order), BATCH):
        rows = order[first : first + BATCH]
        inputs = tokenizer(
            [chats[i] for i in rows],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        are_cut = (new != tokenizer.eos_token_id).all(dim=1).tolist()
        replies.update(zip(rows, zip(texts, are_cut, strict=True), strict=True))
    return [replies[i] for i in range(len(chats))]


def make_candidates(folder: Path, seed: int) -> list[Candidate]:
    """Sample prompts of every form, clean them, and answer them, with the model in `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: dict[str, tuple[str, str]] = {}  # normalised prompt -> prompt, form
    for form in (*FORMS["training"], *FORMS["heldout"], ORDINARY):
        for text in sample_prompts(model, tokenizer, form, seed=seed):
            if prompt := clean(text):
                found.setdefault(normalised(prompt), (prompt, form))
        click.echo(f"{len(found):5d} prompts after {form or 'the ordinary ones'!r}", err=True)
    sampled = list(found.values())
    replies = answers(model, tokenizer, [prompt for prompt, _ in sampled])
    return [
        Candidate(prompt, form, answer, is_cut)
        for (prompt, form), (answer, is_cut) in zip(sampled, replies, strict=True)
    ]


def sort(candidates: Sequence[Candidate]) -> dict[str, dict[str, list[str]]]:
    """Return prompts by verdict ("declined", "answered"), then by form, without the unclear."""
    from abliterator.judge import RuleJudge

    judge = RuleJudge()
    found: dict[str, dict[str, list[str]]] = {
        "declined": defaultdict(list),
        "answered": defaultdict(list),
    }
    for c in candidates:
        verdict = judge.judge(c.prompt, c.answer, finish_reason="length" if c.is_cut else "stop")
        if verdict.refused and verdict.compliance == 0:
            found["declined"][c.form].append(c.prompt)
        elif verdict.compliance == 1 and verdict.coherence == 1:
            found["answered"][c.form].append(c.prompt)
    return found


# --- 4. select -------------------------------------------------------------------------------


def evenly(by_form: dict[str, list[T]], n: int) -> list[T]:
    """Return `n` items, one of each form in turn until the forms are used up."""
    turns = zip_longest(*by_form.values())
    return [item for turn in turns for item in turn if item is not None][:n]


def select(candidates: Sequence[Candidate]) -> dict[str, list[dict[str, str]]]:
    """Return the lines of each prompt file."""
    found = sort(candidates)
    lines = {
        verdict: {
            form: [{"prompt": prompt, "form": form or "ordinary"} for prompt in prompts]
            for form, prompts in by_form.items()
        }
        for verdict, by_form in found.items()
    }
    declined, answered = lines["declined"], lines["answered"]
    pairs = evenly(
        {f: list(zip(declined[f], answered[f], strict=False)) for f in FORMS["training"]}, PAIRS
    )
    ordinary = answered[ORDINARY]
    return {
        "declined": [target for target, _ in pairs],
        "answered": [contrast for _, contrast in pairs],
        "declined_heldout": evenly({f: declined[f] for f in FORMS["heldout"]}, EVALUATION),
        "ordinary": ordinary[:EVALUATION],
        "ordinary_train": ordinary[EVALUATION : EVALUATION + PAIRS],
    }


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--candidates", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--seed", default=0, show_default=True)
def main(model: Path, out: Path, candidates: Path | None, seed: int) -> None:
    """Write the prompt files to OUT, sampled from and sorted by the chat model in MODEL."""
    if candidates and candidates.is_file():
        rows = candidates.read_text("utf-8").splitlines()
        kept = [Candidate(**json.loads(row)) for row in rows]
        found = [c for c in kept if clean(c.prompt)]  # the unwanted words may be more by now
    else:
        found = make_candidates(model, seed)
        if candidates:
            candidates.write_text(jsonl(c._asdict() for c in found), "utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in select(found).items():
        (out / f"{name}.jsonl").write_text(jsonl(lines), "utf-8")
        click.echo(f"{name}: {len(lines)} prompts")


def jsonl(rows: Iterable[dict[str, str]]) -> str:
    """Return `rows` as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
