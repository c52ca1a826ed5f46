"""Jobs of the tests: submitted through the shipped scripts, watched, and harmed on purpose."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from virtual_slurm import VirtualSlurm, wait_for

CHECKOUT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

STEPS = 13
PATIENCE = 240.0
"""Seconds after which a test gives a job up; far more than it takes on an idle machine."""

REQUEUE_WAIT = 1.0
"""Seconds until a requeued job is sent on its way: Slurm tells its starts apart by the second."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY")

TWO_NODES = "igrpo.site.env={IGRPO_NUM_NODES:'2',IGRPO_GPUS_PER_NODE:'2'}"
"""Brings Ray up on two nodes around the embedded engine, whose config knows one node alone."""

TINY = (
    "experiment=demo",
    # Enough to write the format now and then, so that rewards differ within groups.
    "igrpo.warmup.steps=80",
    "igrpo.warmup.batch_size=24",
    "igrpo.threads=1",
    "data.train.num_problems=64",
    "data.validation.num_problems=8",
    "grpo.num_prompts_per_step=2",
    f"grpo.max_num_steps={STEPS}",
    "grpo.val_period=0",
    "grpo.val_at_start=false",
    "grpo.val_at_end=false",
    "checkpointing.save_period=5",
    "checkpointing.metric_name=null",
    "logger.tensorboard_enabled=false",
)
"""Steps of a tenth of a second, saved after 5, 10 and the last."""

FAKE_SECRETS = {
    "HF_TOKEN": "hf_planted0123456789abcdef",
    "WANDB_API_KEY": "planted-wandb-0123456789abcdef",
    "OPENAI_API_KEY": "sk-planted0123456789abcdef",
}

BIN = {
    "igrpo": f'exec {sys.executable} {HERE}/paced_igrpo.py "$@"',
    "python": f'exec {sys.executable} "$@"',
    "ray": f'exec {Path(sys.executable).parent}/ray "$@"',
}


@dataclass
class Run:
    """A run folder, the site it is trained at, and the job that trains it.

    `log_dir` is the run folder as the nodes see it, `successor` the next job of a chain, and `seen`
    what Slurm said of the job at the moment that a test is about.
    """

    cluster: VirtualSlurm
    folder: Path
    log_dir: Path | None = None
    job: str = ""
    successor: str = ""
    seen: str = ""

    @property
    def run_dir(self) -> Path:
        return self.cluster.seen(self.log_dir) if self.log_dir else self.folder / "run"

    @property
    def hold(self) -> Path:
        return self.folder / "hold"

    @property
    def site(self) -> Path:
        """The virtual environment of the job: commands that a test can replace."""
        return self.folder / "site"

    def install(self, **commands: str) -> None:
        """Writes the site's commands; `commands` are shell lines that stand for one of them."""
        self.hold.mkdir(parents=True, exist_ok=True)
        for name, lines in {**BIN, **commands}.items():
            self.replace(name, lines)

    def replace(self, name: str, *lines: str) -> dict[str, str]:
        """Writes one command of the site; the variables in whose shell it comes first."""
        file = self.site / "bin" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(["#!/bin/bash", *lines, ""]))
        file.chmod(0o755)
        return {"PATH": f"{file.parent}:/usr/bin:/bin"}

    def install_stub(
        self, train: str = "exit 0", preflight: str = "exit 0", settings: str = ""
    ) -> None:
        """An `igrpo` of shell lines: for what the launcher makes of an exit code."""
        lines = [
            'case "$1" in',
            f"launch) echo IGRPO_RUN_DIR={self.run_dir}; echo IGRPO_GPUS_PER_NODE=2; {settings} ;;",
            f"preflight) {preflight} ;;",
            f"train) {train} ;;",
            "esac",
        ]
        self.install(igrpo="\n".join(lines))

    def words(self, *words: str) -> list[str]:
        """The tiny run's settings."""
        return [*TINY, f"logger.log_dir={self.log_dir or self.run_dir}", *words]

    def login(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A command of a user on the login node, in the checkout."""
        if not self.site.exists():
            self.install()
        variables = os.environ | FAKE_SECRETS | self.variables() | env
        return self.cluster.run(*command, env=variables, cwd=CHECKOUT)

    def submit(
        self, *words: str, script: str = "train.sh", flags: tuple[str, ...] = (), **env: str
    ) -> None:
        """`sbatch slurm/SCRIPT` with `words`."""
        log = f"--output={self.folder}/job.out"
        command = ("sbatch", "--parsable", log, *flags, f"slurm/{script}", *words)
        done = self.login(*command, **env)
        assert done.returncode == 0, done.stderr
        self.job = done.stdout.strip()

    def train(self, *words: str, flags: tuple[str, ...] = (), **env: str) -> None:
        """Submits the tiny run."""
        self.submit(*self.words(*words), flags=flags, **env)

    def variables(self) -> dict[str, str]:
        return {
            "VENV": str(self.site),
            "IGRPO_TEST_HOLD": str(self.hold),
            "IGRPO_RAY_TMP": str(self.cluster.local),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            # One warm-up of the small model for all runs.
            "XDG_CACHE_HOME": str(self.cluster.root / "cache"),
        }

    # The job, as Slurm sees it.

    def shown(self, job: str = "") -> dict[str, str]:
        text = self.cluster.out("scontrol", "show", "job", "-o", job or self.job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self) -> str:
        return self.shown()["JobState"]

    def wait_for_state(self, *states: str, seconds: float = PATIENCE) -> dict[str, str]:
        self._wait(lambda: self.state() in states, seconds, f"{states}")
        return self.shown()

    def _wait(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Polls, and sends a requeued job on its way: Slurm lets it wait for two minutes."""
        sent: set[str] = set()

        def holds() -> object:
            if condition():
                return True
            shown = self.shown()
            restart = shown["Restarts"]
            if shown["JobState"] in ENDED and not condition():
                raise AssertionError(f"the job has ended before {what}")
            waits = shown["JobState"] == "PENDING" and restart != "0" and restart not in sent
            # A node that still has the job's last start would refuse the next.
            if waits and not self.cluster.processes(f"slurmstepd: [{self.job}."):
                # Once: a change makes the scheduler begin anew.
                sent.add(restart)
                time.sleep(REQUEUE_WAIT)
                self.cluster.out("scontrol", "update", f"jobid={self.job}", "StartTime=now")
            return False

        try:
            wait_for(holds, seconds, f"{what} of job {self.job}")
        except AssertionError as error:
            controller = (self.cluster.root / "log" / "slurmctld.log").read_text()[-2000:]
            raise AssertionError(f"{error}: {self.shown()}\n{self.log()}\n{controller}") from None

    def signal(self, name: str) -> None:
        """To the batch shell alone, as `--signal=B:...` sends it."""
        self.cluster.out("scancel", f"--signal={name}", "--batch", self.job)

    def log(self) -> str:
        """What the job and its driver said, for assertions and for their messages."""
        files = [
            self.folder / "job.out",
            *sorted(self.run_dir.glob("slurm/*.out")),
            *sorted(self.run_dir.glob("slurm/*/*.log")),
        ]
        return "\n".join(f"--- {f}\n{f.read_text()}" for f in files if f.exists())

    def output(self) -> str:
        return (self.folder / "job.out").read_text()

    # The training inside it.

    def close_gate(self, step: int) -> None:
        """The driver is to wait after `step`, once: a start of the run after that passes."""
        self.hold.mkdir(parents=True, exist_ok=True)
        (self.hold / str(step)).touch()

    def open_gate(self, step: int) -> None:
        (self.hold / f"{step}.reached").unlink()

    def wait_at_gate(self, step: int) -> None:
        """Until the driver waits after `step`."""
        self._wait((self.hold / f"{step}.reached").exists, PATIENCE, f"step {step}")

    def kill(self, *words: str, node: str = "") -> None:
        """kill -9 of the one process of the nodes whose command line holds `words`."""
        found = [each for each in self.cluster.processes(*words) if node in each.node]
        assert len(found) == 1, (words, found, self.cluster.processes())
        os.kill(found[0].pid, signal.SIGKILL)

    def kill_head_step(self) -> None:
        """kill -9 of the shell in which the driver is watched."""
        shells = [p for p in self.cluster.processes("head_step.sh") if "bash /" in p.command]
        # Its subshells have the same command line.
        os.kill(min(shell.pid for shell in shells), signal.SIGKILL)

    def resumed_after(self, restart: int) -> int:
        """The step after which a restart went on, as its driver said."""
        said = re.search(r"resuming after step (\d+)", self.driver_log(restart))
        assert said, self.log()
        return int(said[1])

    def steps(self) -> list[int]:
        """The logged training steps, in the order of the file."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [record["step"] for record in records if record["kind"] == "train"]

    def newest_checkpoint(self) -> int:
        folders = (self.run_dir / "checkpoints").glob("step_*")
        return max((int(folder.name[5:]) for folder in folders), default=0)

    def driver_log(self, restart: int) -> str:
        return (self.run_dir / "slurm" / f"{self.job}-{restart}" / "driver.log").read_text()

    def weights(self) -> str:
        model = self.run_dir / "checkpoints" / f"step_{STEPS:08d}" / "model" / "model.safetensors"
        return hashlib.sha256(model.read_bytes()).hexdigest()
