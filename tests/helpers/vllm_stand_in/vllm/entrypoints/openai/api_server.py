"""A small server with the command line and the routes of vLLM's, on the CPU by transformers.

Run as `python -m vllm.entrypoints.openai.api_server` by the interpreter of `vllm_stand_in`. It
answers prompts of token ids greedily, with the checkpoint or with an adapter that was loaded, to
whoever has the key. Arguments that begin with `--stand-in` make it fail as vLLM does.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import threading
import time
import zlib
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def main():
    arguments = parsed()
    if arguments.stand_in_error:
        print("(EngineCore pid=7) INFO 11-28 14:24:50 [core.py:1] Loading weights", file=sys.stderr)
        for line in (arguments.stand_in_error, "RuntimeError: Engine core initialization failed."):
            print(f"(EngineCore pid=7) ERROR 11-28 14:24:50 [core.py:842] {line}", file=sys.stderr)
        sys.exit(1)
    if arguments.stand_in_worker:  # as vLLM's engine is a process of its own
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        Path(arguments.stand_in_worker).write_text(f"{os.getpid()} {worker.pid}")
    if arguments.stand_in_never_ready:
        time.sleep(300)
    print(f"serves {arguments.model} ", file=sys.stderr, flush=True)
    Server(arguments).serve_forever()


def parsed():
    parser = argparse.ArgumentParser("api_server.py")
    for name in ("model", "served-model-name", "host", "dtype", "generation-config"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("port", "tensor-parallel-size", "pipeline-parallel-size"):
        parser.add_argument(f"--{name}", required=True, type=int)
    for name in ("max-model-len", "gpu-memory-utilization", "uvicorn-log-level"):
        parser.add_argument(f"--{name}")
    for name in ("trust-remote-code", "enforce-eager", "enable-lora"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--max-lora-rank", type=int, default=16)
    parser.add_argument("--max-loras", type=int, default=1)
    parser.add_argument("--lora-target-modules", nargs="*")
    for name in ("error", "worker", "never-ready", "dies-after", "no-lora", "ignores"):
        parser.add_argument(f"--stand-in-{name}")
    parser.add_argument("--stand-in-toy", action="store_true")
    return parser.parse_args()


class Toy:
    """Answers that depend on the prompt and on the adapter's tensors alone; made at once."""

    def __init__(self, salt=0):
        self.salt = salt

    def adapted(self, tensors):
        text = "".join(f"{name} {tensor.tobytes()}" for name, tensor in sorted(tensors.items()))
        return Toy(zlib.crc32(text.encode()) if tensors else 0)

    def likeliest(self, ids):
        """Token ids with log-probabilities, the likeliest first."""
        seed = sum(ids) + self.salt
        return {3 + (seed + 7 * rank) % 40: -1.0 - rank for rank in range(5)}


class Model:
    """The checkpoint by transformers."""

    def __init__(self, model):
        self.model = model

    def adapted(self, tensors):
        model = copy.deepcopy(self.model)
        for a in (name for name in tensors if name.endswith("lora_A.weight")):
            weight = model.get_submodule(module_of(a)).weight
            change = tensors[a.replace("lora_A", "lora_B")] @ tensors[a]
            weight.data = (weight.data.float() + weight.new_tensor(change).float()).to(weight.dtype)
        return Model(model)

    def likeliest(self, ids):
        import torch

        with torch.inference_mode():
            logits = self.model(torch.tensor([ids])).logits[0, -1]
        top = logits.log_softmax(-1).topk(5)
        return dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def module_of(tensor):
    return tensor.removeprefix("base_model.model.").removesuffix(".lora_A.weight")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, arguments):
        self.arguments, self.key = arguments, os.environ["VLLM_API_KEY"]
        self.adapters, self.lock, self.answered = {}, threading.Lock(), 0
        super().__init__((arguments.host, arguments.port), Handler)

    @cached_property
    def base(self):
        """Loaded when it is asked first: many tests only start a server."""
        if self.arguments.stand_in_toy:
            return Toy()
        import torch
        from transformers import AutoModelForCausalLM

        dtype = self.arguments.dtype
        dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
        return Model(AutoModelForCausalLM.from_pretrained(self.arguments.model, dtype=dtype).eval())

    @property
    def names(self):
        return [self.arguments.served_model_name, *self.adapters]

    def load(self, name, folder):
        """An error message, or None."""
        from safetensors.numpy import load_file

        config = json.loads((folder / "adapter_config.json").read_text())
        if self.arguments.stand_in_no_lora or not self.arguments.enable_lora:
            return "the server has no slots"
        if config["r"] > self.arguments.max_lora_rank:
            return f"LoRA rank {config['r']} is greater than max_lora_rank"
        kinds = {module.split(".")[-1] for module in config["target_modules"]}
        if not kinds <= set(self.arguments.lora_target_modules):
            return f"{kinds} are not all among the target modules"
        tensors = load_file(folder / "adapter_model.safetensors")
        ignored = f".{self.arguments.stand_in_ignores}."
        self.adapters[name] = self.base.adapted(
            {name: tensor for name, tensor in tensors.items() if ignored not in name}
        )
        return None

    def complete(self, asked):
        with self.lock:
            self.answered += "logprobs" not in asked
            limit = self.arguments.stand_in_dies_after
            if limit and self.answered > int(limit):
                print("torch.OutOfMemoryError: no memory left", file=sys.stderr, flush=True)
                os._exit(1)
            model, prompt = self.adapters.get(asked["model"], self.base), asked["prompt"]
            ids, likeliest = list(prompt), []
            while len(ids) < len(prompt) + asked["max_tokens"]:
                likeliest.append(model.likeliest(ids))
                ids.append(next(iter(likeliest[-1])))
                if ids[-1] in asked.get("stop_token_ids", ()):
                    break
        is_stopped = ids[-1] in asked.get("stop_token_ids", ())
        choice = {
            "index": 0, "text": "", "finish_reason": "stop" if is_stopped else "length",
            "token_ids": ids[len(prompt) :], "prompt_token_ids": prompt,
            "logprobs": {"top_logprobs": likeliest} if "logprobs" in asked else None,
        }  # fmt: skip
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids) - len(prompt)}
        return {
            "object": "text_completion", "model": asked["model"], "choices": [choice],
            "usage": usage,
        }  # fmt: skip


def entry(name):
    return {"id": name, "owned_by": "vllm", "root": "/model"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/version":
            return self.reply({"version": "0.0.1"})
        if not self.authorised():
            return self.reply({"error": "Unauthorized"}, 401)
        if self.path == "/v1/models":
            return self.reply(
                {"object": "list", "data": [entry(name) for name in self.server.names]}
            )
        return self.reply({"error": "Not Found"}, 404)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.authorised():
            return self.reply({"error": "Unauthorized"}, 401)
        if self.path == "/v1/load_lora_adapter":
            problem = self.server.load(asked["lora_name"], Path(asked["lora_path"]))
            if problem:
                message = f"Loading lora {asked['lora_name']} failed: {problem}"
                return self.reply({"error": {"message": message, "code": 400}}, 400)
            return self.reply(f"Success: LoRA adapter '{asked['lora_name']}' added successfully.")
        if self.path == "/v1/unload_lora_adapter":
            del self.server.adapters[asked["lora_name"]]
            return self.reply("Success")
        if self.path != "/v1/completions":
            return self.reply({"error": "Not Found"}, 404)
        if asked["model"] not in self.server.names:
            message = f"The model `{asked['model']}` does not exist."
            return self.reply({"error": {"message": message, "code": 404}}, 404)
        return self.reply(self.server.complete(asked))

    def authorised(self):
        return self.headers.get("Authorization") == f"Bearer {self.server.key}"

    def reply(self, body, status=200):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


main()
