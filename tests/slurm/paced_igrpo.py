"""The command `igrpo` as jobs of these tests run it: the real one, except that training waits where
a test wants to do something to it.

A file HOLD/N, with HOLD the folder in IGRPO_TEST_HOLD, makes the trainer wait after step N was
logged: it renames the file to HOLD/N.reached and goes on when that is gone, or when the run is
asked to stop. The next start of the run finds no HOLD/N and does not wait. With
IGRPO_TEST_RAY=FILE, what Ray consists of is first written to that file, once.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def hold_embedded_trainer(folder: Path) -> None:
    from igrpo_nemo.local.trainer import Trainer

    after_step = Trainer._after_step

    def held(self: Trainer, batch: Any, learned: dict[str, float]) -> None:
        after_step(self, batch, learned)
        wait_at_gate(folder, self.state.step, lambda: self.interrupt.requested)

    Trainer._after_step = held


def hold_nemo_trainer(folder: Path) -> None:
    from igrpo_nemo.nemo.run_log import RunLog

    finish = RunLog._finish
    stop = Path(os.environ["IGRPO_STOP_FILE"])

    def held(self: RunLog, step: int) -> None:
        finish(self, step)
        wait_at_gate(folder, step, stop.exists)
        if stop.exists():
            time.sleep(1.1)  # it is looked at once a second, which is longer than a step

    RunLog._finish = held


def wait_at_gate(folder: Path, step: int, is_asked_to_stop: Callable[[], bool]) -> None:
    gate, reached = folder / str(step), folder / f"{step}.reached"
    if not gate.exists():
        return
    gate.rename(reached)
    deadline = time.monotonic() + 240
    while reached.exists() and not is_asked_to_stop():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody opened {gate}")
        time.sleep(0.02)


def describe_ray(file: Path) -> None:
    """Joins the cluster that RAY_ADDRESS names and writes down what is found there."""
    import ray

    ray.init(log_to_driver=False)

    @ray.remote(num_cpus=0)
    def host() -> str:
        return socket.gethostname()

    nodes = {node["NodeManagerHostname"]: node["Resources"] for node in ray.nodes()}
    places = {name: f"node:{resources_ip(resources)}" for name, resources in nodes.items()}
    ran_on = [ray.get(host.options(resources={at: 0.01}).remote()) for at in places.values()]
    seen = {
        "ran_on": sorted(ran_on),
        "resources": ray.cluster_resources(),
        "ranks": {name: resources["topo_rank"] for name, resources in nodes.items()},
    }
    ray.shutdown()
    stranger = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    asked = subprocess.run(["ray", "status"], env=stranger, capture_output=True, timeout=60)
    seen["without_token"] = "answered" if asked.returncode == 0 else "refused"
    file.write_text(json.dumps(seen))


def resources_ip(resources: dict[str, float]) -> str:
    [name] = [n for n in resources if n.startswith("node:") and "internal" not in n]
    return name.removeprefix("node:")


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        description = Path(os.environ.get("IGRPO_TEST_RAY", os.devnull))
        if not description.exists():
            describe_ray(description)
        if "IGRPO_TEST_HOLD" in os.environ:
            is_nemo = any(word.startswith("engine=nemo") for word in sys.argv)
            hold = hold_nemo_trainer if is_nemo else hold_embedded_trainer
            hold(Path(os.environ["IGRPO_TEST_HOLD"]))
    from igrpo_nemo.cli import main

    sys.exit(main())
