"""A model's tokenizer, with its chat template, from local files only."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.errors import CheckpointError
from abliterator.files import read_text, require_plain_folder, shown
from abliterator.model._foreign import as_sentence, foreign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder, without the model.

    Where it has no chat template, it gets that of the folder's processor.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
    """
    require_plain_folder(folder, but="*.safetensors")  # a tokenizer needs no weights
    from transformers import AutoTokenizer

    with foreign(
        f"The tokenizer in {folder} cannot be loaded", _remedy(folder), error=CheckpointError
    ):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        empty = not len(tokenizer)
        if not empty:  # what only fails when it is used fails now
            tokenizer.decode(tokenizer("Name a planet.")["input_ids"], skip_special_tokens=True)
            # transformers asks for the id of an unknown special token without end
            _ = tokenizer.all_special_ids, tokenizer.eos_token_id, tokenizer.pad_token_id
    if empty:
        raise CheckpointError(f"The folder {folder} has no tokenizer. {_remedy(folder)}")
    if not tokenizer.chat_template:
        tokenizer.chat_template = _processors_template(folder)
    return tokenizer


# Files that only a further package reads, and what to install for them.
_READ_BY = {
    "*.model": {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"},
    "*.tiktoken": {"tiktoken": "tiktoken"},
    "tekken.json": {"mistral_common": "mistral-common"},
}


def _remedy(folder: Path) -> str:
    """What to do about a tokenizer that does not load: install a package, else download files."""
    is_complete = (folder / "tokenizer.json").is_file()
    missing_packages = {
        package: file.name
        for pattern, readers in ({} if is_complete else _READ_BY).items()
        for file in folder.glob(pattern)
        for module, package in readers.items()
        if not _is_installed(module)
    }
    if missing_packages:
        file = shown(next(iter(missing_packages.values())))
        return (
            f"Reading {file} needs a package that is not installed: `pip install "
            f"{' '.join(missing_packages)}`, or put the model's tokenizer.json into the folder."
        )
    return (
        "Download the tokenizer files of the model (tokenizer.json, tokenizer_config.json) into "
        "the folder."
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that would hold it
        return False


def _processors_template(folder: Path) -> str | dict[str, str] | None:
    """The chat template of the folder's processor, in the files that transformers' own reads.

    Vision models have one beside the tokenizer, which then has none itself.
    """
    for name in ("chat_template.json", "processor_config.json"):
        file = folder / name
        if not file.exists():
            continue
        try:
            settings = json.loads(read_text(file))
            template: Any = settings.get("chat_template")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{file} is not a JSON object ({as_sentence(error)}), and it should hold the "
                "model's chat template. Download it again, or put a chat_template.jinja into the "
                "folder."
            ) from error
        if template:
            return template  # type: ignore[no-any-return]  # `render_messages` says what is no text
    return None
