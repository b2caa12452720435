"""Resolves a model's name to a folder: a local one, the embedded demo, or the Hub at a commit.

This module locates files and does not interpret them; it imports neither torch nor
transformers. For a plan of a model on the Hub, only the headers of its weights are downloaded.

    source = resolve_folder("HuggingFaceTB/SmolLM2-135M-Instruct", revision=None)
    source.folder, source.revision

    with headers_folder("Qwen/Qwen3-32B", revision=None) as source:
        Checkpoint.open(source.folder)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import TypeVar

from abliterator.errors import CheckpointError, HubUnreachable
from abliterator.files import readable

EMBEDDED = "embedded:"
RECIPE = "recipe.yaml"  # of a published checkpoint

# What a loader, the edit and the card need; never pickles, other runtimes' formats, or a second
# copy of the weights.
_TOKENIZER = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_DOWNLOAD = ["*.safetensors", *_TOKENIZER, "*.py", "LICENSE*", "NOTICE*", "*.md"]
_SKIP = ["original/*", "onnx/*", "consolidated*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"]

# What a plan reads, beside the headers of the weights.
_READ = ("config.json", "model.safetensors.index.json", "tokenizer_config.json")
_LONGEST_JSON = 100_000_000  # bytes: safetensors' limit of a header; nothing larger is fetched
_CONNECTIONS = 8  # the headers of 160 shards then take seconds

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSource:
    """A model's folder, its name as given by the user, and its commit if it came from the Hub.

    `gated` is whether the Hub requires its terms to be accepted; False where the Hub was not
    queried.
    """

    folder: Path
    id: str
    revision: str | None
    gated: bool = False


@dataclass(frozen=True)
class _Listing:
    """A model on the Hub at a commit: all file names, and sizes of what a build downloads."""

    id: str
    commit: str
    names: tuple[str, ...]
    sizes: Mapping[str, int]
    gated: bool


def resolve_folder(model: str, *, revision: str | None) -> ModelSource:
    """The folder of `model`: "embedded:demo", an existing folder, or a Hub id to download.

    Args:
        model: what the recipe says.
        revision: branch, tag or commit on the Hub; None is its main branch. Unused for folders.

    Raises:
        CheckpointError: if there is no such model, or it has no safetensors files.
    """
    return _with_safetensors(_on_disk(model) or _download(model, revision))


def folder_on_disk(model: str, *, revision: str | None) -> Path | None:
    """The folder of `model` if it is on this machine, the Hub's cache included; else None.

    Nothing is asked of the Hub.
    """
    try:
        source = _on_disk(model) or _download(model, revision, local_files_only=True)
    except CheckpointError:
        return None
    return source.folder


@contextmanager
def headers_folder(model: str, *, revision: str | None) -> Iterator[ModelSource]:
    """The folder of `model` for as long as the context lasts, to read headers and sizes from.

    A model on the Hub that is not whole in the cache is not downloaded: its files are there by name
    and size, but only config.json, the index, tokenizer_config.json and the headers of the weights
    have their content. The rest is a hole in the file, which occupies no disk space.

    Args:
        model: as for `resolve_folder`.
        revision: as for `resolve_folder`.

    Raises:
        CheckpointError: if there is no such model, it has no safetensors files, or its server
            cannot send parts of files.
    """
    source = _on_disk(model)
    if source is None:
        listing = None
        with suppress(HubUnreachable):
            listing = _list(model, revision)
        if listing is not None and not _is_cached(listing):
            with TemporaryDirectory(prefix="abliterator-plan-") as scratch:
                yield _lay_out(listing, Path(scratch))
            return
        commit = revision if listing is None else listing.commit
        source = _download(model, commit, local_files_only=True)
        source = replace(source, gated=listing is not None and listing.gated)
    yield _with_safetensors(source)


def _on_disk(model: str) -> ModelSource | None:
    """The model if it is embedded or a folder; None if it has to be an id on the Hub."""
    if model.startswith(EMBEDDED):
        return ModelSource(_embedded_folder(model.removeprefix(EMBEDDED)), model, None)
    if (local := Path(model).expanduser()).is_dir():
        return ModelSource(local, model, None)
    if local.exists() or model.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model} is not a folder. Give the folder of a checkpoint (config.json beside "
            "*.safetensors), or the id of a model on the Hub, such as Qwen/Qwen3-1.7B."
        )
    return None


def _embedded_folder(name: str) -> Path:
    folder = Path(str(files("abliterator"))) / "data" / name / "model"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"There is no embedded model {name!r}. `embedded:demo` is the one that comes with "
            "abliterator; if that is the name you gave, the installation is incomplete: install "
            "abliterator again."
        )
    return folder


def _download(
    model: str,
    revision: str | None,
    patterns: Sequence[str] = _DOWNLOAD,
    *,
    local_files_only: bool = False,
) -> ModelSource:
    from huggingface_hub import snapshot_download

    folder = _call_hub(
        model,
        revision,
        lambda: snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=_SKIP,
            local_files_only=local_files_only,
        ),
    )
    return ModelSource(Path(folder), model, Path(folder).name)


def _call_hub(model: str, revision: str | None, call: Callable[[], T]) -> T:
    """The result of `call`; errors of the Hub or the network become a CheckpointError."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    kind = CheckpointError
    try:
        return call()
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
    except (HTTPError, OSError) as error:  # the HTTP client's own, and what derives from it
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            problem = (
                "cannot be asked for: the Hub does not know the token. Log in with `hf auth "
                "login`, or set HF_TOKEN to a token that is still valid"
            )
        else:
            kind = HubUnreachable
            problem = (
                f"is not on this machine, and the Hub cannot be reached ({type(error).__name__}). "
                "Connect to the network (HF_HUB_OFFLINE must not be set), or give the folder of a "
                "checkpoint"
            )
    if (rooted := Path("/", model)).is_dir():
        problem = f"is no folder here, but {rooted} is one: give its whole path"
    # Raised here, outside the clauses, so that no request with its headers is chained to the error.
    raise kind(f"The model {model} {problem}.")


def _list(model: str, revision: str | None) -> _Listing:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    def list_files() -> _Listing:
        info = HfApi().model_info(model, revision=revision)
        commit = str(info.sha)
        tree = HfApi().list_repo_tree(model, revision=commit, recursive=True)
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
        selected = filter_repo_objects(sizes, allow_patterns=_DOWNLOAD, ignore_patterns=_SKIP)
        selected_sizes = {name: sizes[name] for name in selected}
        return _Listing(model, commit, tuple(sizes), selected_sizes, bool(info.gated))

    listing = _call_hub(model, revision, list_files)
    for name in listing.names:
        path = PureWindowsPath(name)  # which parses the other systems' separators and roots too
        if path.anchor or ".." in path.parts:
            raise CheckpointError(
                f"The model {model} has a file {name!a}, which is not a plain path inside it. "
                "Nothing was written there; do not use this model."
            )
    return listing


def _is_cached(listing: _Listing) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return all(
        isinstance(try_to_load_from_cache(listing.id, name, revision=listing.commit), str)
        for name in listing.sizes
    )


def _lay_out(listing: _Listing, scratch: Path) -> ModelSource:
    """Writes the files of a listing: small ones whole, of weights the headers, else holes."""
    _require_safetensors(listing.id, listing.names)
    folder = scratch / listing.id  # so that messages about its files name the model
    contents = _call_hub(listing.id, listing.commit, partial(_fetch, listing))
    try:
        for name, size in listing.sizes.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(contents.get(name, b""))
                file.truncate(size)
    except OSError as error:
        raise CheckpointError(
            f"The headers of {listing.id} cannot be kept in {scratch}: {error.strerror or error}. "
            "Set TMPDIR to a folder on another disk, or download the model and give its folder."
        ) from error
    return ModelSource(folder, listing.id, listing.commit, listing.gated)


def _fetch(listing: _Listing) -> dict[str, bytes]:
    """The content of the files that a plan reads, and the header of each weight file."""
    from huggingface_hub import hf_hub_download

    download = partial(hf_hub_download, listing.id, revision=listing.commit)
    with TemporaryDirectory(prefix="abliterator-plan-") as cache:
        contents = {
            name: Path(download(filename=name, cache_dir=cache)).read_bytes()
            for name in _READ
            if listing.sizes.get(name, _LONGEST_JSON + 1) <= _LONGEST_JSON
        }
    weights = [name for name in listing.sizes if name.endswith(".safetensors")]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return contents | dict(
            zip(weights, pool.map(partial(_header, listing), weights), strict=True)
        )


def _header(listing: _Listing, name: str) -> bytes:
    """The length of a safetensors header and the header; of an impossible length, that alone."""
    prefix = _range(listing, name, 0, min(8, listing.sizes[name]))
    length = int.from_bytes(prefix, "little")
    if length > min(listing.sizes[name] - 8, _LONGEST_JSON):
        return prefix
    return prefix + _range(listing, name, 8, 8 + length)


def _range(listing: _Listing, name: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` (excluded) of a file on the Hub, and no byte more."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    content = b""
    if start >= stop:
        return content
    range_header = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with http_stream_backoff(
        "GET",
        hf_hub_url(listing.id, name, revision=listing.commit),
        headers=build_hf_headers() | range_header,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),  # it cannot resume a body that breaks off
    ) as response:
        hf_raise_for_status(response)
        if response.status_code == 206:
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) >= stop - start:
                    break
    if len(content) != stop - start:
        raise CheckpointError(
            f"The server of {listing.id} did not send the part of {name} that it was asked for "
            f"(HTTP {response.status_code}, {len(content)} of {stop - start} bytes taken), and "
            f"whole weights are not downloaded for a plan. Download them with `hf download "
            f"{listing.id}`, and plan again."
        )
    return content


def tokenizer_folder(model: str) -> Path:
    """The folder of a model's tokenizer; of a Hub id, no weights are downloaded.

    Raises:
        CheckpointError: if there is no such model.
    """
    return (_on_disk(model) or _download(model, None, _TOKENIZER)).folder


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


def _with_safetensors(source: ModelSource) -> ModelSource:
    with readable(source.folder):
        names = [path.name for path in source.folder.iterdir()]
    _require_safetensors(source.id, names)
    return source


def _require_safetensors(model: str, names: Iterable[str]) -> None:
    top_level = sorted(name for name in names if "/" not in name)
    if any(name.endswith(".safetensors") for name in top_level):
        return
    if gguf := [name for name in top_level if name.endswith(".gguf")]:
        raise CheckpointError(
            f"The model {model} has its weights as GGUF ({gguf[0]}), and an edit is not stored in "
            "that. Use the model it was made from, in bfloat16 or FP8, and convert the edited one."
        )
    pickles = [name for name in top_level if name.endswith((".bin", ".pt", ".pth"))]
    available = (
        f"only {', '.join(pickles[:3])}, which can run code when read" if pickles else "none at all"
    )
    raise CheckpointError(
        f"The model {model} has no weights in safetensors format ({available}). Convert it where "
        "you trust it: `AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)`, and "
        "the same for its tokenizer."
    )
