"""Checkpoint folders as files: the position of each tensor's bytes, and edits of some of them.

safetensors headers are read here and not by the library, because the contract is about bytes: which
range of which file belongs to which tensor. A folder is proven sound before anything is written.
The ranges that stay are streamed, the bytes of each tensor to be edited are handed to the caller,
and a file is replaced only when all of it is on the disk. Where tensors change dtype or shape,
`shard_layout` gives the new header. What an edit means, what a tensor is for, and how bytes become
numbers is outside this package; torch is never imported.

    base = Checkpoint.open(Path("Llama-3.2-1B-Instruct"))
    names = ["model.layers.9.mlp.down_proj.weight"]
    for file in base.weight_files:
        edited = [base.tensors[name] for name in names if base.tensors[name].file == file]
        patch_file(base.folder / file, out / file, edited, edit)  # edit changes a buffer in place
    copied, left_out = auxiliary_files(base.folder)
    for file in copied:
        copy_file(base.folder / file, out / file)
"""

from abliterator.checkpoint._auxiliary import auxiliary_files, is_legal, is_opened_by_loaders
from abliterator.checkpoint._card_metadata import card_metadata, declared_base_models
from abliterator.checkpoint._config import (
    ADAPTER_METADATA,
    ADAPTER_WEIGHTS,
    CONFIG_ENTRY,
    QUANTISER_FILE,
    adapter_config,
    adapter_tensors,
    edited_config,
    edited_quantiser_config,
)
from abliterator.checkpoint._fingerprint import fingerprint
from abliterator.checkpoint._folder import ADAPTER_CONFIG, CONFIG_FILE, INDEX_FILE, Checkpoint
from abliterator.checkpoint._header import DTYPE_BITS, TensorInfo
from abliterator.checkpoint._patch import PatchedFile, PatchedTensor, TensorEditor, patch_file
from abliterator.checkpoint._shard_layout import ShardLayout, edited_index, shard_layout
from abliterator.checkpoint._threads import FileThreads

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_METADATA",
    "ADAPTER_WEIGHTS",
    "CONFIG_ENTRY",
    "CONFIG_FILE",
    "DTYPE_BITS",
    "INDEX_FILE",
    "QUANTISER_FILE",
    "Checkpoint",
    "FileThreads",
    "PatchedFile",
    "PatchedTensor",
    "ShardLayout",
    "TensorEditor",
    "TensorInfo",
    "adapter_config",
    "adapter_tensors",
    "auxiliary_files",
    "card_metadata",
    "declared_base_models",
    "edited_config",
    "edited_index",
    "edited_quantiser_config",
    "fingerprint",
    "is_legal",
    "is_opened_by_loaders",
    "patch_file",
    "shard_layout",
]
