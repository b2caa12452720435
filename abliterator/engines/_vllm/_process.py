"""A vLLM server as a child process: started, awaited, ended."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from abliterator.diagnostics import VllmInstall
from abliterator.engines._vllm._command import (
    Served,
    server_command,
    server_environment,
)
from abliterator.engines._vllm._http import served_models
from abliterator.engines._vllm._log import IN_USE, log_since, reason
from abliterator.errors import ServerError
from abliterator.processes import child_process, under_parent
from abliterator.recipe import STARTED_KEY, EngineSettings

_STARTS = 3  # where another program took the port that was free a moment ago
_POLL_SECONDS = 0.2
_NOTE_SECONDS = 30

OnNote = Callable[[str], None]


class Address(NamedTuple):
    """Where a server answers, up to and with /v1, and the key that it wants."""

    base_url: str
    key: str


@dataclass
class VllmServer:
    """A server that runs.

    Attributes:
        address: of the server.
        served: the checkpoint.
        install: the vLLM that serves it.
        log: what it writes.
    """

    address: Address
    served: Served
    install: VllmInstall
    log: Path
    _child: subprocess.Popen[str]
    _log_start: int

    def require_running(self) -> None:
        """Checks that the server did not end.

        Raises:
            ServerError: with the reason in its log.
        """
        if self._child.poll() is not None:
            raise ServerError(
                f"vLLM {self.install.version} ended while it served {self.served.folder.name} "
                f"(status {self._child.returncode}). {self._reason()} Answers that it gave are "
                f"kept: the same command goes on from there. The whole log is {self.log}."
            )

    def _reason(self) -> str:
        return reason(log_since(self.log, self._log_start))


@contextmanager
def vllm_server(
    install: VllmInstall,
    served: Served,
    settings: EngineSettings,
    *,
    log: Path,
    on_note: OnNote = lambda note: None,
) -> Iterator[VllmServer]:
    """A server of a checkpoint, as long as the context is open.

    It listens at a free port of this machine, answers whoever has its random key, and ends when
    this process does, however that ends.

    Args:
        install: the vLLM.
        served: the checkpoint.
        settings: how it is started.
        log: a file, to which it is appended.
        on_note: called with news of the start.

    Raises:
        ServerError: for a server that ends or is not ready in time.
        RecipeError: for arguments that the run itself sets.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    for start in range(_STARTS):
        key, port = _key(), _free_port()
        command = server_command(install, served, settings, port)
        with log.open("a", encoding="utf-8") as errors:
            environment = server_environment(install, settings, key=key)
            command = under_parent(command, drop=install.drops)
            with child_process(command, env=environment, stderr=errors) as child:
                address = Address(f"http://127.0.0.1:{port}/v1", key)
                size = log.stat().st_size
                server = VllmServer(address, served, install, log, child, size)
                if not _is_ready(server, settings.start_timeout, on_note):
                    if start + 1 < _STARTS and IN_USE in server._reason().lower():
                        continue
                    raise ServerError(
                        f"vLLM {install.version} ended while it started (status "
                        f"{child.returncode}). {server._reason()} The whole log is {log}."
                    )
                try:
                    yield server
                finally:
                    _end(child)
                return


def _is_ready(server: VllmServer, timeout: float, on_note: OnNote) -> bool:
    """Waits until the server answers; whether it does, and did not end before.

    Raises:
        ServerError: if it is not ready in time.
    """
    begin = noted = time.monotonic()
    on_note(f"vLLM {server.install.version} starts; its log is {server.log}.")
    while server._child.poll() is None:
        now = time.monotonic()
        if server.served.name in served_models(server.address):
            on_note(f"vLLM is ready after {now - begin:.0f} s.")
            return True
        if now - begin > timeout:
            raise ServerError(
                f"vLLM {server.install.version} was not ready after {timeout:.0f} s "
                f"(`engine.start_timeout`). {server._reason()} The whole log is {server.log}."
            )
        if now - noted > _NOTE_SECONDS:
            noted = now
            on_note(f"vLLM is still starting after {now - begin:.0f} s.")
        time.sleep(_POLL_SECONDS)
    return False


def _end(child: subprocess.Popen[str]) -> None:
    """Asks the server to end, by closing the pipe that keeps it running."""
    if child.stdin is not None:
        child.stdin.close()


@cache
def _key() -> str:
    """The random key of all servers of this process."""
    os.environ[STARTED_KEY] = secrets.token_urlsafe(24)
    return os.environ[STARTED_KEY]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
