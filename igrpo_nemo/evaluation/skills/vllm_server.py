"""vLLM on this machine, for as long as an evaluation takes.

    find_vllm --> Server without an address --vllm_serving--> vllm serve on loopback --> its address

A model is split over as many GPUs as its heads allow, and the other GPUs hold copies of it.
"""

from __future__ import annotations

import shlex
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.skills.command import Server
from igrpo_nemo.evaluation.skills.program import Waiting, last_line, server_answers, started

START_S = 3600.0
"""Weights come from a shared disk, and kernels are compiled."""


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
    vllm: str, server: Server, arguments: str, logs: Path, environ: Mapping[str, str]
) -> Iterator[str]:
    """Runs `vllm serve` with its output in `logs`/vllm.log; yields the address, ending in /v1.

    Raises `UserError` with vLLM's last line where it ends before it answers.
    """
    log = logs / "vllm.log"
    log.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}/v1"
    command = vllm_command(vllm, server, arguments, port, _gpus(environ))
    # Not the command: further arguments may hold a key.
    print(f"vllm serve {server.model}; it says the rest in {log}", flush=True)
    # Slurm's variables of tasks torch and MPI would take for a launch of theirs.
    child = {name: value for name, value in environ.items() if not name.startswith("SLURM_")}
    # Ctrl-C is for the evaluation, which ends the server last.
    with started(command, log, environ=child, start_new_session=True) as process:
        waiting = Waiting(log)
        while not server_answers(address):
            if (code := process.poll()) is not None:
                said = last_line(log)
                raise UserError(f"vllm serve ended with exit code {code}: {said}; see {log}")
            if waiting.seconds > START_S:
                raise UserError(f"vllm serve did not answer within {START_S:.0f} s; see {log}")
            waiting.tell()
            time.sleep(0.5)
        yield address


def vllm_command(vllm: str, server: Server, arguments: str, port: int, gpus: int) -> list[str]:
    """`vllm serve MODEL` on loopback: on `server.gpus` GPUs at most, times as many as fit."""
    size = server.gpus or 1
    while size > max(gpus, 1):
        size //= 2
    copies = gpus // size
    return [
        *(vllm, "serve", server.model, "--host", "127.0.0.1", "--port", str(port)),
        *("--tensor-parallel-size", str(size)),
        *(("--data-parallel-size", str(copies)) if copies > 1 else ()),
        *shlex.split(arguments),
    ]


def _gpus(environ: Mapping[str, str]) -> int:
    """The GPUs that this process may use."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    import torch

    return torch.cuda.device_count()
