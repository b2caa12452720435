"""Loading a model, rendering a chat, batching prompts, and the one manager of forward hooks.

The room knows where models come from (a folder, the Hub, the embedded demo) and how to run one
without surprises: local files only, safetensors only, no randomly initialised weight, no date of
today in a prompt. It does not know what hooks compute, nor which modules matter.

    source = resolve_folder("HuggingFaceTB/SmolLM2-135M-Instruct", revision=None)
    loaded = load_model(source.folder, device="cpu", dtype="float32")
    ids = render_chat(loaded.tokenizer, "Name a planet.")
    with hooked(loaded.model, {"model.layers.9": lambda hidden: hidden - hidden @ basis @ basis.T}):
        loaded.model(torch.tensor([ids]))
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from abliterator.errors import CheckpointError, GenerationError, RecipeError, UnsupportedModel

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Hook = Callable[[Tensor], Tensor | None]
T = TypeVar("T")

EMBEDDED = "embedded:"

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
_SKIP = ["original/*", "onnx/*", "consolidated*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Qwen 1 is older than chat templates: its own code writes this text, and generation_config.json
# marks the chat models by "chat_format". The system prompt is that code's default.
_CHATML = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML_STOPS = ("<|im_end|>", "<|im_start|>")

# Some templates write today's date: prompts, and so directions, would change from day to day. This
# is the date that Llama 3's template falls back to. A macro, because a template sees plain data
# only, never a function of ours.
_FIXED_DATE = "26 Jul 2024"
_FIXED_CLOCK = "{%- macro strftime_now(format) %}" + _FIXED_DATE + "{% endmacro %}"


@dataclass(frozen=True)
class ModelSource:
    """A model's folder, what the user called it, and its commit if it came from the Hub."""

    folder: Path
    id: str
    revision: str | None


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer.

    Attributes:
        model: the causal LM, without gradients.
        tokenizer: its tokenizer; padding is never left to it.
        folder: where both were loaded from.
        device: where the weights are.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    device: str


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


def load_model(
    folder: Path, *, device: str, dtype: str | None, trust_remote_code: bool = False
) -> LoadedModel:
    """Loads the causal LM and the tokenizer in `folder`, from local files only.

    Args:
        folder: a checkpoint in safetensors format.
        device: as torch names it: "cpu", "cuda", "cuda:1", "mps".
        dtype: "float32", "bfloat16" or "float16"; None is the dtype that config.json says.
        trust_remote_code: whether Python files in `folder` may run.

    Raises:
        CheckpointError: if weights are missing, or there is no tokenizer.
        GenerationError: if transformers cannot load it, or the device cannot hold it.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise RecipeError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}.")
    model = _load_weights(folder, _DTYPES[dtype] if dtype else "auto", trust_remote_code)
    tokenizer = _load_tokenizer(folder, trust_remote_code)
    if tokenizer.chat_template is None and chat_format(model) == "chatml":
        tokenizer.chat_template = _CHATML
    try:
        model = model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        raise GenerationError(
            f"The model in {folder} cannot be put on device {device!r}: {_first_line(error)} Use a "
            "device that this machine has and that can hold the model; `cpu` always works."
        ) from error
    return LoadedModel(model, tokenizer, folder, device)


def chat_format(model: PreTrainedModel) -> str | None:
    """How Qwen 1 says that it is a chat model ("chatml"); other models have no such field."""
    return getattr(model.generation_config, "chat_format", None)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a chat of one user turn, up to and with the generation prompt.

    The template writes the special tokens, so the text is tokenised without adding any (no second
    BOS). A template that asks for the date gets a fixed one.

    Raises:
        UnsupportedModel: if there is no chat template, or it refuses these messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UnsupportedModel(
            "The model has no chat template, so its prompts cannot be rendered as the model was "
            "trained to read them. Use the chat or instruct version of the model, or put a "
            "chat_template.jinja in its folder."
        )
    turns = [{"role": "user", "content": prompt}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _FIXED_CLOCK + template
    try:
        text = tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=True,
            chat_template=template,
            **dict(template_kwargs or {}),
        )
    except (TemplateError, TypeError) as error:
        raise UnsupportedModel(
            "The model's chat template cannot render a chat "
            f"{'with' if system is not None else 'without'} a system prompt: {_first_line(error)} "
            "Change the system prompt or the template arguments in the recipe."
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Puts a forward hook on each module path; afterwards they are gone, whatever happens.

    A hook gets the hidden states that the module returned (the first element of a tuple) and
    returns their replacement, or None to leave them. It must not change them in place: the same
    tensor may be the residual stream of another module.

    Raises:
        UnsupportedModel: for a path that the model does not have.
    """
    handles: list[RemovableHandle] = []
    try:
        for path, hook in hooks.items():
            handles.append(_submodule(model, path).register_forward_hook(_adapted(hook)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_paths(anatomy_blocks: str, n_layers: int) -> list[str]:
    """Module paths of all blocks: the output of the i-th (from 0) is residual layer i + 1."""
    return [f"{anatomy_blocks}.{i}" for i in range(n_layers)]


def equal_length_batches(
    token_ids: Sequence[Sequence[int]], max_batch_tokens: int
) -> list[list[int]]:
    """Indices of prompts in batches of one token length each, so that no row is ever padded.

    Shortest first, in the given order within a length: the same prompts always make the same
    batches. A prompt longer than `max_batch_tokens` is a batch alone.
    """
    lengths: dict[int, list[int]] = {}
    for index, ids in enumerate(token_ids):
        lengths.setdefault(len(ids), []).append(index)
    batches = []
    for length, indices in sorted(lengths.items()):
        rows = max(1, max_batch_tokens // max(1, length))
        batches += [indices[i : i + rows] for i in range(0, len(indices), rows)]
    return batches


def run_batches(
    batches: Iterable[list[int]], run: Callable[[list[int]], T]
) -> Iterator[tuple[list[int], T]]:
    """Yields (batch, run(batch)); a batch that does not fit in memory is halved, and so are later ones.

    Raises:
        GenerationError: if not even one row fits.
    """
    queue = deque(batches)
    limit: int | None = None
    while queue:
        batch = queue.popleft()
        if limit and len(batch) > limit:
            queue.extendleft((batch[limit:], batch[:limit]))
            continue
        try:
            result = run(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise GenerationError(
                    "One prompt alone does not fit in the device's memory beside the model. Use "
                    "shorter prompts or answers, a smaller dtype (`--dtype bfloat16`), or a "
                    "larger device."
                ) from error
            limit = len(batch) // 2
            queue.appendleft(batch)
        else:
            yield batch, result
            continue
        # Out of the except clause: until there, the traceback keeps the failed run's tensors alive.
        gc.collect()
        torch.cuda.empty_cache()


def _embedded_folder(name: str) -> Path:
    folder = Path(str(files("abliterator"))) / "data" / name / "model"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"There is no embedded model {name!r}. `embedded:demo` is the one that comes with "
            "abliterator; if that is what you asked for, the installation is incomplete: install "
            "abliterator again."
        )
    return folder


def _download(model: str, revision: str | None) -> ModelSource:
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
            model, revision=revision, allow_patterns=_DOWNLOAD, ignore_patterns=_SKIP
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


def _load_weights(
    folder: Path, dtype: torch.dtype | str, trust_remote_code: bool
) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        # Attention is left to transformers' default (sdpa where the model has it): remote code may
        # have eager only.
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise CheckpointError(
            f"A weight file in {folder} is damaged: {_first_line(error)} Download the model again."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise GenerationError(
            f"transformers cannot load the model in {folder}: {_first_line(error)} Check that the "
            "folder holds a whole causal LM; if it needs its own code, set trust_remote_code and "
            "pin a revision in the recipe."
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"The weights in {folder} lack {len(missing)} tensors that the model needs, such as "
            f"{missing[0]}: they would be random numbers. Download the model again."
        )
    loaded: PreTrainedModel = model
    return loaded


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        empty = not len(tokenizer)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be loaded: {_first_line(error)} Download the "
            "tokenizer files of the model (tokenizer.json, tokenizer_config.json) into the "
            "folder."
        ) from error
    if empty:
        raise CheckpointError(
            f"The folder {folder} has no tokenizer. Download the tokenizer files of the model "
            f"(tokenizer.json, tokenizer_config.json) into it."
        )
    return tokenizer


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UnsupportedModel(
            f"The loaded model has no module {path}, though the anatomy of its architecture names "
            "it. Use a checkpoint whose model_type is the one in its config.json, or a version of "
            "transformers that keeps this name."
        ) from None


def _adapted(hook: Hook) -> Callable[[nn.Module, Any, Any], Any]:
    """`hook` with torch's signature, for modules that return a tensor or a tuple of it and more."""

    def forward_hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return hook(output)
        replacement = hook(output[0])
        return None if replacement is None else (replacement, *output[1:])

    return forward_hook


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, as a sentence."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__).strip()
    return line if line.endswith((".", "!", "?")) else line + "."
