"""Windows' rules for files, kept by a process on Linux, so that what breaks there breaks here.

    with windows_rules(tmp_path):
        build(recipe, tmp_path / "out")

Below the folder: what is open or mapped in this process cannot be replaced, renamed or deleted,
and what is mapped not emptied; `os.rename` replaces nothing; folders cannot be opened; no symbolic
links (Windows without its developer mode); no reserved names and characters; no two names that
differ in case alone; paths of at most 259 characters, folders 247, where the folder stands for
`C:\\Users\\somebody\\models`. These are kept for libraries too, as far as Python opens their files.
The package's own modules see Windows' `os`, `signal` and `sys`: other names are missing there.

Not kept: what processes beside this one hold open, the rules for reading, drives, permissions.
"""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import abliterator

ROOT = r"C:\Users\somebody\models"
"""What the folder stands for where lengths are counted."""
LONGEST_FILE, LONGEST_FOLDER = 259, 247  # characters of a path; no NUL counted

_CHARACTERS = frozenset('<>:"/\\|?*') | {chr(code) for code in range(32)}
_DEVICES = frozenset(
    {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
    | {f"{port}{digit}" for port in ("COM", "LPT") for digit in "123456789¹²³"}
)
_PROBES = ".filelock-probe-"  # how filelock tries out flock, which it does not use on Windows
# By module, what Windows' has not: of what a package of ours could come to use.
_MISSING = {
    "os": set(
        """
        sysconf fork forkpty setsid getpgid getpgrp killpg wait waitid uname getloadavg nice
        sched_getaffinity sched_setaffinity getuid geteuid getgid chown fchown fchmod
        pread pwrite preadv pwritev copy_file_range sendfile splice posix_fallocate posix_fadvise
        lockf mkfifo mknod statvfs memfd_create eventfd getxattr setxattr
        O_NOFOLLOW O_DIRECTORY O_CLOEXEC O_NONBLOCK O_SYNC O_TMPFILE SEEK_DATA SEEK_HOLE WNOHANG
        """.split()  # noqa: SIM905
    ),
    "signal": set(
        """
        SIGKILL SIGHUP SIGQUIT SIGALRM SIGUSR1 SIGUSR2 SIGPIPE SIGCHLD SIGSTOP SIGCONT SIGTSTP
        alarm setitimer pause pthread_kill pthread_sigmask sigwait
        """.split()  # noqa: SIM905
    ),
    "sys": {"abiflags"},
}
_OTHER: dict[str, dict[str, Any]] = {"os": {"name": "nt"}, "sys": {"platform": "win32"}}


class _Module(ModuleType):
    """A module as Windows has it; what is set goes to the real one."""

    def __init__(self, real: ModuleType) -> None:
        super().__init__(real.__name__)
        vars(self)["_real"] = real

    def __getattr__(self, name: str) -> Any:
        real = vars(self)["_real"]
        if name in _MISSING[real.__name__]:
            raise AttributeError(f"module {real.__name__!r} has no attribute {name!r} on Windows")
        return _OTHER.get(real.__name__, {}).get(name, getattr(real, name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_real"], name, value)


class _Rules:
    """The audit hook: it stays in the process for good, and works while there is a folder."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._is_installed = False

    def install(self) -> None:
        if not self._is_installed:
            sys.addaudithook(self._heard)
            self._is_installed = True

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or not (event == "open" or event.startswith("os.")):
            return
        if event == "open":
            path = self.inside(arguments[0])
            if path is not None:
                self._opening(path, arguments[2])
        elif event == "os.symlink" and self.inside(arguments[1]):
            raise _error(1314, errno.EINVAL, "A required privilege is not held", arguments[1])
        elif event == "os.mkdir" and (path := self.inside(arguments[0])):
            self._require_name(path, LONGEST_FOLDER)
        elif event in ("os.remove", "os.rmdir") and (path := self.inside(arguments[0])):
            self._require_free(path)
        elif event == "os.rename":
            source, target = map(self.inside, arguments[:2])
            if source:
                self._require_free(source)
            if target:
                self._require_name(target, LONGEST_FILE)
                self._require_free(target)

    def inside(self, path: object) -> Path | None:
        """The absolute path, if it is below the folder; links of folders above are followed."""
        if self.folder is None or not isinstance(path, (str, bytes, os.PathLike)):
            return None
        given = Path(os.fsdecode(path))
        absolute = given.parent.resolve() / given.name
        return absolute if self.folder in absolute.parents else None

    def _opening(self, path: Path, flags: int) -> None:
        if path.is_dir():
            raise _error(5, errno.EACCES, "Access is denied (a folder is opened)", path)
        if flags & os.O_CREAT:
            self._require_name(path, LONGEST_FILE)
        if flags & os.O_TRUNC and str(path) in _mapped():
            raise _error(1224, errno.EINVAL, "A user-mapped section is open", path)

    def _require_free(self, path: Path) -> None:
        """Refuses a file that is open or mapped, and a folder that holds one."""
        if path.name.startswith(_PROBES):
            return
        for used in _open() | _mapped():
            if used == str(path) or used.startswith(f"{path}{os.sep}"):
                raise _error(32, errno.EACCES, "The file is being used by a process", used)

    def _require_name(self, path: Path, longest: int) -> None:
        assert self.folder is not None
        relative = path.relative_to(self.folder)
        if len(ROOT) + 1 + len(str(relative)) > longest:
            raise _error(206, errno.ENOENT, f"The path is longer than {longest} characters", path)
        parent = self.folder
        for name in relative.parts:
            if fault := fault_of_name(name):
                raise _error(123, errno.EINVAL, f"The file name is not correct: {fault}", path)
            for other in parent.iterdir() if parent.is_dir() else ():
                if other.name != name and other.name.casefold() == name.casefold():
                    raise _error(183, errno.EEXIST, f"The file is there, as {other.name}", path)
            parent /= name


def fault_of_name(name: str) -> str | None:
    """Why Windows has no file of this name, None where it may have one."""
    if bad := sorted(set(name) & _CHARACTERS):
        return f"it has {bad[0]!a}"
    if name.endswith((".", " ")):
        return "it ends in a dot or a space"
    stem = name.split(".")[0].rstrip(" ").upper()
    return f"{stem} is a device" if stem in _DEVICES else None


def _open() -> set[str]:
    """Paths of the files that this process has open."""
    paths = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of this listing
            paths.add(str(descriptor.readlink()))
    return paths


def _mapped() -> set[str]:
    """Paths of the files that this process has mapped into its memory."""
    lines = Path("/proc/self/maps").read_bytes().decode(errors="surrogateescape").splitlines()
    return {line.split(maxsplit=5)[-1] for line in lines}


def _error(winerror: int, number: int, text: str, path: object) -> OSError:
    """The exception that Python raises on Windows, with its `winerror`."""
    error = OSError(number, f"[WinError {winerror}] {text}", path)
    error.winerror = winerror  # type: ignore[attr-defined]
    return error


def _rename(real: Callable[..., None], source: Any, target: Any, **options: Any) -> None:
    if _RULES.inside(target) and os.path.lexists(target):
        raise _error(183, errno.EEXIST, "The file is there already", target)
    real(source, target, **options)


def _fsync(real: Callable[[Any], None], descriptor: Any) -> None:
    import fcntl

    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise _error(6, errno.EBADF, "It is not open for writing", number)
    real(descriptor)


_RULES = _Rules()


def package_modules() -> list[ModuleType]:
    """All modules of the package, imported."""
    packages = pkgutil.walk_packages(abliterator.__path__, "abliterator.")
    names = [package.name for package in packages]
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


@contextmanager
def windows_rules(folder: Path) -> Iterator[None]:
    """Keeps the rules below `folder` within the block."""
    real = {"os": os, "signal": signal, "sys": sys}
    with pytest.MonkeyPatch.context() as patch:
        for module in package_modules():
            for name, value in real.items():
                if vars(module).get(name) is value:
                    patch.setattr(module, name, _Module(value))
        patch.setattr(shutil, "_use_fd_functions", False)  # as on Windows: by path
        patch.setattr(os, "rename", partial(_rename, os.rename))
        patch.setattr(os, "fsync", partial(_fsync, os.fsync))
        _RULES.install()
        patch.setattr(_RULES, "folder", folder.resolve())
        yield
