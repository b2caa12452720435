"""Checkpoint folders as files: where each tensor's bytes lie, and how to change some of them.

The room reads safetensors headers itself, because the contract is about bytes: which range of which
file belongs to which tensor. It proves a folder sound before anything is written, streams the
ranges that stay, hands the bytes of each tensor to be edited to its caller, and replaces a file
only when all of it is on the disk. It does not know what an edit means, what a tensor is for, or
how bytes become numbers; it never imports torch. Where tensors change dtype or shape, `relay` tells
the new header.

    base = Checkpoint.open(Path("Llama-3.2-1B-Instruct"))
    names = ["model.layers.9.mlp.down_proj.weight"]
    for file in base.weight_files:
        edited = [base.tensors[name] for name in names if base.tensors[name].file == file]
        patch_file(base.folder / file, out / file, edited, edit)  # edit changes a buffer in place
    carried, left_out = carried_files(base.folder)
    for file in carried:
        copy_file(base.folder / file, out / file)
"""

from abliterator.checkpoint._carry import carried_files, is_legal, is_opened_by_loaders
from abliterator.checkpoint._config import (
    ADAPTER_CONFIG,
    ADAPTER_METADATA,
    ADAPTER_WEIGHTS,
    CONFIG_ENTRY,
    adapter_config,
    adapter_tensors,
    edited_config,
)
from abliterator.checkpoint._fingerprint import fingerprint
from abliterator.checkpoint._folder import CONFIG_FILE, INDEX_FILE, Checkpoint
from abliterator.checkpoint._header import DTYPE_BITS, TensorInfo
from abliterator.checkpoint._patch import Edit, PatchedFile, PatchedTensor, patch_file
from abliterator.checkpoint._relay import Relaid, relaid_index, relay
from abliterator.checkpoint._stated import card_metadata, stated_base

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_METADATA",
    "ADAPTER_WEIGHTS",
    "CONFIG_ENTRY",
    "CONFIG_FILE",
    "DTYPE_BITS",
    "INDEX_FILE",
    "Checkpoint",
    "Edit",
    "PatchedFile",
    "PatchedTensor",
    "Relaid",
    "TensorInfo",
    "adapter_config",
    "adapter_tensors",
    "card_metadata",
    "carried_files",
    "edited_config",
    "fingerprint",
    "is_legal",
    "is_opened_by_loaders",
    "patch_file",
    "relaid_index",
    "relay",
    "stated_base",
]
