"""Two small tasks with known answers, and tiny models that say one word."""

from __future__ import annotations

from pathlib import Path

from abliterator.benchmarks import DocScore, RunSettings, TaskScores
from abliterator.benchmarks._run import run_tasks
from abliterator.benchmarks._settings import open_model
from abliterator.recipe import BenchmarkEngine, Benchmarks, Chat

QUESTIONS = [
    {"question": f"is {a} {b} ?", "choices": ["yes", "no"], "label": int((i + j) % 5 > 2)}
    for i, a in enumerate(["red", "blue", "green", "black", "white"])
    for j, b in enumerate(["warm", "cold", "dark", "light", "plain", "loud"])
]
YES = sum(doc["label"] == 0 for doc in QUESTIONS)  # 18 of 30
CHOICE = {
    "task": "toy_choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/questions.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "question : {{question}} answer :",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "metric_list": [
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
    "metadata": {"version": 1.0},
}
SAY = {
    **{key: CHOICE[key] for key in ("dataset_path", "test_split", "doc_to_text")},
    "dataset_kwargs": {**CHOICE["dataset_kwargs"], "trust_remote_code": False},
    "task": "toy_say",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[label]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 3},
    "filter_list": [
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}]},
        {"name": "raw", "filter": []},
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 2.0},
}
for _filter in SAY["filter_list"]:
    _filter["filter"].append({"function": "take_first"})


def run_settings(*, system=None, template_kwargs=(), **section) -> RunSettings:
    """How tasks are run: keys of the recipe's `chat` and `benchmarks`; by default all documents."""
    return RunSettings(
        section=Benchmarks(**{"preset": None, "limit": None, **section}),
        chat=Chat(system=system, template_kwargs=dict(template_kwargs)),
    )


def server_engine(url: str) -> BenchmarkEngine:
    return BenchmarkEngine(kind="server", base_url=url, edited_url=url)


def run(folder, tasks, **given):
    return run_tasks(folder, tasks, run_settings(**given))


def opened(folder, **settings):
    """lm-eval's model of a checkpoint, as transformers'."""
    return open_model(folder, RunSettings(**settings)).model


def save_model(folder: Path, change=None, chat_template: bool = True) -> Path:
    """A random two-layer llama (float32, untied), edited by `change`, with a small tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word for doc in QUESTIONS for word in doc["question"].split()}
    vocabulary = [
        "<unk>",
        "<eos>",
        "user",
        "model",
        "question",
        ":",
        "answer",
        "yes",
        "no",
        *sorted(words),
    ]
    backend = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>"
    )
    if chat_template:
        tokenizer.chat_template = (
            "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"
            "{% if add_generation_prompt %}model :\n{% endif %}"
        )
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=1.0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if change is not None:
        with torch.no_grad():
            change(model, vocabulary)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def always(word: str):
    """Makes the model say `word` whatever it reads: a constant stream, and one row that fits it."""

    def change(model, vocabulary):
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[vocabulary.index(word)] = 1.0

    return change


def scored(values, *, task="t", aggregates=(), gold=None, filter="none") -> TaskScores:
    docs = tuple(
        DocScore(
            doc_id=i, filter=filter, doc_hash=str(i), prompt_hash="p", target_hash="t", value=value,
            gold_loglik=None if gold is None else gold[i],
        )
        for i, value in enumerate(values)
    )  # fmt: skip
    return TaskScores(
        task=task, metric="acc", n=len(docs), higher_is_better=True, scores=docs, settings={},
        aggregates=aggregates,
    )  # fmt: skip
