"""NeMo-Skills and vLLM as programs: where they are, run to their end, ended with all they started.

NeMo-Skills' requirements conflict with newer tools, so it is never imported here. It starts each
command in a session of its own and waits for a server without end: a run is ended with all its
descendants, and a server that stays silent ends the run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import time
import urllib.error
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.model import open_models
from igrpo_nemo.files import cache_folder
from igrpo_nemo.files.display_text import shorten

SUPPORTED = "0.7"
LOOPBACK = "127.0.0.1,localhost"
SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "NVIDIA_API_KEY",
    "NGC_API_KEY",
    "AZURE_OPENAI_API_KEY",
    "OPENAI_API_KEY",
)
"""NeMo-Skills writes those that are set into the batch scripts of its jobs."""

POLL_S = 1.0
SILENT_S = 15.0
"""A server that refused connections for so long is taken for dead."""
PROGRESS_S = 60.0
START_S = 3600.0
"""vLLM's weights come from a shared disk, and kernels are compiled."""
GRACE_S = 10.0
"""Between asking a process to end and ending it."""
PROBE_S = 120.0
"""How long a line of Python may take in NeMo-Skills' environment."""

_HOW_TO_INSTALL = (
    "install NeMo-Skills as its README says, into an environment of its own, and set "
    "NEMO_SKILLS_ENV to that folder (docs/evaluation.md)"
)
_VERSION = "import importlib.metadata as m; print(m.version('nemo_skills'))"


@dataclass(frozen=True, slots=True)
class SkillsEnvironment:
    """An environment with NeMo-Skills: the folder of its `ns` and `python`, and the version."""

    bin: Path
    version: str

    @property
    def ns(self) -> str:
        return str(self.bin / "ns")

    @property
    def python(self) -> str:
        return str(self.bin / "python")

    @property
    def version_warning(self) -> str | None:
        """A sentence where the version is another one than these pipelines were tested with."""
        if f"{self.version}.".startswith(f"{SUPPORTED}."):
            return None
        return f"NeMo-Skills {self.version} was not tested with this: {SUPPORTED} was"


class ServerDied(Exception):
    """The server stopped answering while it was needed."""


def find_environment(environ: Mapping[str, str]) -> SkillsEnvironment:
    """The environment of `NEMO_SKILLS_ENV`, of `VENV`, of the `ns` on PATH, or of the cache.

    Raises `UserError` where there is none, where it cannot run, and where curl is missing.
    """
    folder = _bin_folder(environ)
    if shutil.which("curl", path=environ.get("PATH")) is None:
        raise UserError("curl is not found: NeMo-Skills waits for servers with it, install it")
    return SkillsEnvironment(folder, python_says(folder, _VERSION, environ))


def python_says(folder: Path, code: str, environ: Mapping[str, str]) -> str:
    """What a line of Python prints in NeMo-Skills' environment, whose `bin` is `folder`. Raises
    `UserError` where it does not run."""
    try:
        done = subprocess.run(
            [folder / "python", "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            env=child_environ(folder, environ),
        )
    except OSError as error:
        reason = f"cannot start {folder / 'python'}: {error.strerror or error}"
    except subprocess.TimeoutExpired:
        reason = f"its Python said nothing within {PROBE_S:.0f} s"
    else:
        if done.returncode == 0:
            return done.stdout.strip()
        reason = next(iter(done.stderr.strip().splitlines()[::-1]), "no reason given")
    raise UserError(f"NeMo-Skills in {folder.parent} does not run: {reason}")


def _bin_folder(environ: Mapping[str, str]) -> Path:
    for name in ("NEMO_SKILLS_ENV", "VENV"):
        if named := environ.get(name):
            folder = Path(named).expanduser().absolute() / "bin"
            if (folder / "ns").is_file():
                return folder
            if name == "NEMO_SKILLS_ENV":
                raise UserError(f"{name}={named} has no bin/ns: {_HOW_TO_INSTALL}")
    if found := shutil.which("ns", path=environ.get("PATH")):
        return Path(found).resolve().parent  # beside a link to it there is another python
    # `make install-skills` makes one there.
    cached = [file.parent for file in cache_folder().glob("nemo-skills-env-*/bin/ns")]
    if not cached:
        raise UserError(f"NeMo-Skills is not found: {_HOW_TO_INSTALL}")
    return max(cached, key=lambda folder: folder.stat().st_mtime)


def child_environ(bin_folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a NeMo-Skills command.

    Its jobs call a bare `python`, so its own folder comes first on PATH. Loopback never goes
    through a proxy.
    """
    child = dict(environ)
    child["PATH"] = os.pathsep.join([str(bin_folder), environ.get("PATH", os.defpath)])
    child.pop("PYTHONHOME", None)
    for name in ("NO_PROXY", "no_proxy"):
        child[name] = ",".join(filter(None, [environ.get(name), LOOPBACK]))
    child.setdefault("COLUMNS", "200")  # the width of its log lines
    # Otherwise every process asks the network for a price list.
    child.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return child


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The same without the secrets that NeMo-Skills would write into batch scripts."""
    child = {name: value for name, value in environ.items() if name not in SECRETS}
    child["HF_TOKEN_PATH"] = os.devnull
    return child


def run_logged(
    command: Sequence[str],
    log: Path,
    *,
    cwd: Path,
    environ: Mapping[str, str],
    alive: Callable[[], bool] = lambda: True,
) -> int:
    """Runs a command with stdout and stderr in `log`; returns its exit code.

    Raises `ServerDied` once `alive` has been false for `SILENT_S` seconds. Whatever ends this call,
    no process of the command outlives it.
    """
    with started(command, log, environ=environ, cwd=cwd) as running:
        seen = 0.0
        while (code := running.code()) is None:
            if alive():
                seen = running.seconds
            elif running.seconds - seen > SILENT_S:
                raise ServerDied
            time.sleep(POLL_S)
        return code


class Running:
    """A command at work: what its log says last is printed every `PROGRESS_S` seconds."""

    def __init__(self, process: psutil.Popen, log: Path) -> None:
        self._process, self._log = process, log
        self._began, self._next = time.monotonic(), PROGRESS_S
        self._below: set[psutil.Process] = set()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def code(self) -> int | None:
        """The exit code; None while it runs."""
        if (code := self._process.poll()) is not None:
            return code
        self._below = _descendants(self._process)
        if self.seconds >= self._next:
            self._next += PROGRESS_S
            said = shorten(last_line(self._log), 150)
            print(f"{self._log.stem}, {self.seconds:.0f} s: {said}", flush=True)
        return None

    def end(self) -> None:
        """SIGTERM to it and all below it, and SIGKILL after `GRACE_S`; what was started meanwhile
        is ended too, and what has lost its parent."""
        known = {self._process, *self._below}
        everyone = {each for one in known for each in (one, *_descendants(one))}
        for one in everyone:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                one.terminate()
        _, left = psutil.wait_procs(everyone, timeout=GRACE_S)
        for one in left:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                one.kill()
        self._process.wait()


@contextmanager
def started(
    command: Sequence[str], log: Path, *, environ: Mapping[str, str], **options: Any
) -> Iterator[Running]:
    """A command without input, its output added to `log`; ended with all that it started."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = psutil.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(environ),
            **options,
        )
        running = Running(process, log)
        try:
            yield running
        finally:
            running.end()


def _descendants(process: psutil.Process) -> set[psutil.Process]:
    try:
        return set(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def processes_with(word: str) -> list[int]:
    """The processes of this machine that have a word among their arguments that begins so."""
    listed = ((one.pid, one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"]))
    return [pid for pid, words in listed if any(each.startswith(word) for each in words)]


def server_answers(address: str) -> bool:
    """Whether something listens at an OpenAI-compatible address. A busy server counts as alive."""
    try:
        open_models(address, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:
        return any(isinstance(e, TimeoutError) for e in (error, getattr(error, "reason", None)))
    return True


def last_line(log: Path, word: str = "") -> str:
    """The last line of a log that says something, of those with a word if there is one; without
    the frame that `ns` draws around it."""
    lines = [line.strip(" ─│╭╮╰╯") for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line] or ["it said nothing"]
    return ([line for line in said if word in line] or said)[-1]


def find_vllm(environ: Mapping[str, str]) -> str | None:
    """The command: `VLLM` of the environment, or the `vllm` on PATH. Raises `UserError` where
    `VLLM` names no program."""
    named = environ.get("VLLM")
    found = shutil.which(named or "vllm", path=environ.get("PATH"))
    if named and found is None:
        raise UserError(f"VLLM={named} is no program: give the path of the command vllm")
    return found


@contextmanager
def vllm_serving(
    vllm: str, model: str, gpus: int | None, arguments: str, log: Path, environ: Mapping[str, str]
) -> Iterator[str]:
    """Runs `vllm serve` on loopback with its output in `log`; yields the address, ending in /v1.

    The model is split over `gpus` GPUs at most. Raises `UserError` with vLLM's last line where it
    ends before it answers.
    """
    log.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}/v1"
    command = vllm_command(vllm, model, arguments, port, gpus or 1, _visible_gpus(environ))
    # Not the command: further arguments may hold a key.
    print(f"vllm serve {model}; it says the rest in {log}", flush=True)
    # Slurm's variables of tasks torch and MPI would take for a launch of theirs.
    child = {name: value for name, value in environ.items() if not name.startswith("SLURM_")}
    # Ctrl-C is for the evaluation, which ends the server last.
    with started(command, log, environ=child, start_new_session=True) as running:
        while not server_answers(address):
            if (code := running.code()) is not None:
                said = last_line(log)
                raise UserError(f"vllm serve ended with exit code {code}: {said}; see {log}")
            if running.seconds > START_S:
                raise UserError(f"vllm serve did not answer within {START_S:.0f} s; see {log}")
            time.sleep(0.5)
        yield address


def vllm_command(
    vllm: str, model: str, arguments: str, port: int, size: int, gpus: int
) -> list[str]:
    """`vllm serve MODEL` on loopback: on `size` of the GPUs at most, times as many as fit."""
    while size > max(gpus, 1):
        size //= 2
    copies = gpus // size
    return [
        *(vllm, "serve", model, "--host", "127.0.0.1", "--port", str(port)),
        *("--tensor-parallel-size", str(size)),
        *(("--data-parallel-size", str(copies)) if copies > 1 else ()),
        *shlex.split(arguments),
    ]


def _visible_gpus(environ: Mapping[str, str]) -> int:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    import torch

    return torch.cuda.device_count()
