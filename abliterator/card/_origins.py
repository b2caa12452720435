"""The card's part on base model, prompt sets and versions, and on loading the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from abliterator.card._header import COMMIT, hub_base
from abliterator.card._licences import obligations
from abliterator.card._markdown import (
    Markdown,
    Row,
    escape,
    last_name,
    row,
    without_paths,
    yaml_fence,
)
from abliterator.record import ModelIdentity, PromptOrigin, Provenance, RunRecord


def base_name(model: ModelIdentity) -> str:
    """A Hub id, or the last name of a local folder."""
    return model.id if model.revision is not None else last_name(model.id)


def origin_variables(record: RunRecord, *, adapter: bool) -> dict[str, object]:
    """Variables of the template for base, prompt sets, versions and recipe."""
    # a system prompt may look like a path ("/no_think") and must be shown as it was
    recipe = {
        key: value if key == "chat" else without_paths(value)
        for key, value in record.recipe.items()
    }
    return {
        "base_model": _base_rows(record.model),
        "artefact": Markdown("adapter" if adapter else "checkpoint"),
        "obligations": obligations(record.model.license),
        "loading": _loading(record, adapter=adapter),
        "lock": _lock_rows(record),
        "prompt_origins": [_prompt_row(origin) for origin in record.provenance.prompts],
        "prompt_filter": _prompt_filter(record.provenance),
        "base_files": sorted(record.model.files_sha256.items()),
        "recipe": yaml_fence(recipe),
    }


def _base_rows(model: ModelIdentity) -> Iterator[Row]:
    """Name, architecture and licence of the base."""
    if model.revision is None:
        yield row("Local model", base_name(model))
    else:
        yield row("Model", base_name(model))
        yield row("Revision", model.revision)
    size = f"{model.n_layers} blocks, width {model.d_model}"
    yield row("Architecture", Markdown(f"{escape(model.model_type)}, {size}"))
    yield row("Licence", _or_absent(model.license, "Not stated by the base"))
    if model.license_name is not None:
        yield row("Its name", model.license_name)
    if model.license_link is not None:
        yield row("Its text", model.license_link)


def _lock_rows(record: RunRecord) -> Iterator[Row]:
    """Versions and circumstances that the bits of a build depend on."""
    provenance = record.provenance
    yield row("Tool", Markdown(f"{escape(record.tool.name)} {escape(record.tool.version)}"))
    if provenance.git_commit is not None:
        yield row("Commit of the tool", provenance.git_commit)
    yield row("Recipe digest", record.recipe_digest)
    yield row("Created", provenance.created)
    yield row("Device", provenance.device)
    if provenance.hardware is not None:
        yield row("Hardware", provenance.hardware)
    yield row("Type of computation", provenance.dtype)
    yield row("Python", provenance.python)
    yield row("Platform", provenance.platform)
    for package, version in sorted(provenance.packages.items()):
        yield Markdown(f"Package {escape(package)}"), version
    for artefact, digest in sorted(provenance.digests.items()):
        yield Markdown(f"sha256 of {escape(artefact)}"), digest


def _prompt_row(origin: PromptOrigin) -> Row:
    """Source of a prompt set, and counts of its prompts."""
    return (
        origin.name,
        last_name(origin.source) if origin.revision is None else origin.source,
        _or_absent(origin.revision, "Local"),
        _or_absent(origin.split, "-"),
        _or_absent(origin.license, "Not stated"),
        _or_absent(origin.read, "-"),
        origin.dropped - origin.overlap,
        origin.overlap,
        origin.n,
        _or_absent(origin.near, "-"),
        origin.sha256,
    )


def _prompt_filter(provenance: Provenance) -> Markdown:
    """Which prompts were dropped, and which were only counted."""
    text = (
        "Of the prompts read, duplicates (and empty rows) were dropped, and from extraction sets "
        f"the prompts that an evaluation set has too (overlap: {provenance.dropped_overlap} in "
        "all). Two prompts count as the same whatever their case, spacing, invisible characters, "
        "variants of quotes and dashes, and punctuation at the ends of words."
    )
    if provenance.near_duplicate is not None:
        text += (
            " Near are prompts that were kept though they resemble an evaluation prompt: their "
            "sets of letter trigrams have a Jaccard index of at least "
            f"{escape(provenance.near_duplicate)}."
        )
    return Markdown(text)


def _loading(record: RunRecord, *, adapter: bool) -> Markdown:
    """Python that loads the model and generates an answer, and how a server loads it."""
    remote = record.recipe.get("trust_remote_code") is True
    lines = _load_adapter(record, remote) if adapter else _load_checkpoint(remote)
    code = "\n".join([*lines, *_GENERATE])
    if remote:
        whose = "the base" if adapter else "this folder, which are the base's"
        note = f"`trust_remote_code=True` runs the Python files of {whose}: read them first."
    else:
        note = _SERVE_ADAPTER if adapter else _SERVE_CHECKPOINT
    return Markdown(f"```python\n{code}\n```\n\n{note}")


_SERVE_CHECKPOINT = (
    "As a server: `vllm serve FOLDER_OR_ID`. For llama.cpp: `python convert_hf_to_gguf.py FOLDER` "
    "from its repository."
)
_SERVE_ADAPTER = (
    "As a server: `vllm serve BASE --enable-lora --lora-modules edited=FOLDER_OR_ID`. For "
    "llama.cpp: `python convert_lora_to_gguf.py\nFOLDER` from its repository."
)
_GENERATE = (
    "",
    'messages = [{"role": "user", "content": "Which planet is the largest?"}]',
    "inputs = tokenizer.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
    ")",
    "answer = model.generate(**inputs, max_new_tokens=256, do_sample=False)",
    'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
)


def _load_checkpoint(remote: bool) -> Iterator[str]:
    trust = ", trust_remote_code=True" if remote else ""
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield 'checkpoint = "."  # this folder, or the id of this repository'
    yield f"tokenizer = AutoTokenizer.from_pretrained(checkpoint{trust})"
    yield f'model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto"{trust})'


def _load_adapter(record: RunRecord, remote: bool) -> Iterator[str]:
    base, commit = hub_base(record), record.model.revision or ""
    is_pinned = base is not None and COMMIT.fullmatch(commit) is not None
    options = ", revision=commit" if is_pinned else ""
    options += ", trust_remote_code=True" if remote else ""
    yield "from peft import PeftModel"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield f'base = "{base or "BASE"}"  # id of the base, or its folder'
    if is_pinned:
        yield f'commit = "{commit}"'
    yield 'adapter = "."  # this folder, or the id of this repository'
    yield f"tokenizer = AutoTokenizer.from_pretrained(base{options})"
    yield f'model = AutoModelForCausalLM.from_pretrained(base, dtype="auto"{options})'
    yield (
        "model = PeftModel.from_pretrained(model, adapter)  "
        "# .merge_and_unload() puts it into the weights"
    )


def _or_absent(value: object, absent: str) -> object:
    """The value, or the text `absent` for None."""
    return Markdown(absent) if value is None else value
