"""A model's name to a folder of files: a local folder, the embedded demo, or the Hub at a commit.

The room knows where files come from, not what is in them; it loads neither torch nor transformers,
so a plan is quick.

    source = resolve_folder("HuggingFaceTB/SmolLM2-135M-Instruct", revision=None)
    source.folder, source.revision
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from abliterator.errors import CheckpointError

EMBEDDED = "embedded:"
RECIPE = "recipe.yaml"  # of a published checkpoint

# What a loader, the edit and the card need; never pickles, other runtimes' formats, or a second
# copy of the weights.
_DOWNLOAD = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "*.md",
]
_TOKENIZER = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_SKIP = ["original/*", "onnx/*", "consolidated*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"]


@dataclass(frozen=True)
class ModelSource:
    """A model's folder, what the user called it, and its commit if it came from the Hub."""

    folder: Path
    id: str
    revision: str | None


def resolve_folder(model: str, *, revision: str | None) -> ModelSource:
    """The folder of `model`: "embedded:demo", an existing folder, or a Hub id to download.

    Args:
        model: what the recipe says.
        revision: branch, tag or commit on the Hub; None is its main branch. Unused for folders.

    Raises:
        CheckpointError: if there is no such model, or it has no safetensors files.
    """
    if model.startswith(EMBEDDED):
        source = ModelSource(_embedded_folder(model.removeprefix(EMBEDDED)), model, None)
    elif (local := Path(model).expanduser()).is_dir():
        source = ModelSource(local, model, None)
    elif local.exists() or model.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model} is not a folder. Give the folder of a checkpoint (config.json beside "
            "*.safetensors), or the id of a model on the Hub, such as Qwen/Qwen3-1.7B."
        )
    else:
        source = _download(model, revision)
    _require_safetensors(source)
    return source


def _embedded_folder(name: str) -> Path:
    folder = Path(str(files("abliterator"))) / "data" / name / "model"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"There is no embedded model {name!r}. `embedded:demo` is the one that comes with "
            "abliterator; if that is what you asked for, the installation is incomplete: install "
            "abliterator again."
        )
    return folder


def _download(model: str, revision: str | None, patterns: Sequence[str] = _DOWNLOAD) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            model, revision=revision, allow_patterns=list(patterns), ignore_patterns=_SKIP
        )
    except HFValidationError:
        problem = "is neither a folder nor an id on the Hub. Ids look like Qwen/Qwen3-1.7B"
    except GatedRepoError:
        problem = "is gated. Accept its terms on its Hub page, then log in with `hf auth login`"
    except RevisionNotFoundError:
        problem = (
            f"has no revision {revision!r} on the Hub. Use a branch, a tag or a full commit hash"
        )
    except RepositoryNotFoundError:
        problem = (
            "was found neither as a folder nor on the Hub. Check the spelling; if it is private, "
            "log in with `hf auth login`"
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        problem = (
            f"is not on this machine, and the Hub cannot be reached ({type(error).__name__}). "
            "Connect to the network (HF_HUB_OFFLINE must not be set), or give the folder of a "
            "checkpoint"
        )
    else:
        return ModelSource(Path(folder), model, Path(folder).name)
    # Raised here, outside the clauses, so that no request with its headers is chained to the error.
    raise CheckpointError(f"The model {model} {problem}.")


def tokenizer_folder(model: str) -> Path:
    """The folder of a model's tokenizer; of a Hub id, no weights are downloaded.

    Raises:
        CheckpointError: if there is no such model.
    """
    if model.startswith(EMBEDDED):
        return _embedded_folder(model.removeprefix(EMBEDDED))
    local = Path(model).expanduser()
    return local if local.is_dir() else _download(model, None, _TOKENIZER).folder


def published_folder(name: str) -> Path:
    """The folder of a checkpoint that abliterator made, for its recipe and records alone.

    Args:
        name: a folder, or the id of a repository on the Hub; of that, no weights are downloaded.

    Raises:
        CheckpointError: if there is no recipe in it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _download(name, None, [RECIPE, "abliterator/*.json"]).folder
    if not (folder / RECIPE).is_file():
        raise CheckpointError(
            f"{name} has no {RECIPE}; a checkpoint that `abliterator build` made was expected, "
            "such as OUT/checkpoint or what was published of it."
        )
    return folder


def _require_safetensors(source: ModelSource) -> None:
    if any(source.folder.glob("*.safetensors")):
        return
    pickles = sorted(
        path.name for ending in ("*.bin", "*.pt", "*.pth") for path in source.folder.glob(ending)
    )
    seen = (
        f"only {', '.join(pickles[:3])}, which can run code when read" if pickles else "none at all"
    )
    raise CheckpointError(
        f"The model {source.id} has no weights in safetensors format ({seen}). Convert it where "
        "you trust it: `AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)`, and "
        "the same for its tokenizer."
    )
