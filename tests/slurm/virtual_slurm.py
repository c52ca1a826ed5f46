"""A real Slurm on this machine: nodes that run jobs, and larger ones that only plan them.

    VirtualSlurm(root) ─ setpriv --pdeathsig ─ unshare ─ virtual_cluster.sh
                                                ├─ munged, slurmctld          10.77.0.254
                                                └─ namespaces of node1, slurmd  10.77.0.1
                                                   and of node2, node3

Network, mounts and processes live in namespaces that end with their first process, which ends with
this one, however that happens: nothing is left behind, and clusters do not see each other.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "shellcheck")
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "shellcheck", "unshare", "setpriv")
NODES = 3
CPUS = 16
GPUS = 8

CONF = """\
ClusterName=virtual
SlurmctldHost=controller(10.77.0.254)
SlurmctldPort=16917
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
GresTypes=gpu
SlurmdParameters=config_overrides
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/nodes/%n.pid
SlurmdSpoolDir={root}/nodes/%n
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
KillWait=3
MinJobAge=3600
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=INFINITE
NodeName=node[1-3] NodeAddr=10.77.0.[1-3] CPUs={cpus} RealMemory=4000 Gres=gpu:a100:{gpus}
# Nodes in a cloud that nobody starts: they take part in planning alone.
NodeName=wide[1-5] CPUs=64 RealMemory=4000 Gres=gpu:a100:{gpus} State=CLOUD
NodeName=narrow[1-5] CPUs=64 RealMemory=4000 Gres=gpu:a100:4 State=CLOUD
PartitionName=batch Nodes=node[1-2] Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=node[1-2] MaxTime=INFINITE PriorityTier=10
# For what goes on beside the other tests.
PartitionName=side Nodes=node3 MaxTime=INFINITE
PartitionName=wide1 Nodes=wide1 MaxTime=INFINITE
PartitionName=wide2 Nodes=wide[1-2] MaxTime=INFINITE
PartitionName=wide4 Nodes=wide[1-4] MaxTime=INFINITE
PartitionName=wide5 Nodes=wide[1-5] MaxTime=INFINITE
PartitionName=narrow5 Nodes=narrow[1-5] MaxTime=INFINITE
"""


class Unavailable(Exception):
    """Why this machine cannot run a virtual cluster."""


@dataclass(frozen=True)
class Process:
    """A process of a node: its number on this machine and its command line."""

    pid: int
    node: str
    command: str


class VirtualSlurm:
    """The cluster, once `start()` returned."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.local = root / "local"
        """Private to each node: for what Ray keeps on local disks."""
        self.small = root / "small"
        """24 MB, shared by the nodes; `seen` says where this process finds it."""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> VirtualSlurm:
        require_commands()
        require_namespaces()
        self._write_files()
        script = Path(__file__).with_name("virtual_cluster.sh")
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc"]
        with (self.root / "log" / "cluster.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "--kill-child=KILL"]
                + ["bash", str(script), str(self.root), str(NODES)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # Not the terminal's process group: Ctrl-C is for the tests, which then clean up.
                start_new_session=True,
            )
        try:
            self._wait_until_idle()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends every process of the cluster; its namespaces go with the first of them."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=30)
            deadline = time.monotonic() + 30
            while self.processes() and time.monotonic() < deadline:
                time.sleep(0.05)
            self._process = None

    def run(
        self, *command: str, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A client command, such as `squeue`, in the cluster's network."""
        assert self._process is not None
        return subprocess.run(
            ["nsenter", f"--net=/proc/{self._process.pid}/ns/net", *command],
            env={
                **(os.environ if env is None else env),
                "SLURM_CONF": str(self.root / "slurm.conf"),
            },
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def out(self, *command: str) -> str:
        """What a client command prints; it has to succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def seen(self, path: Path) -> Path:
        """A path of the nodes' shared disks as this process can open it."""
        assert self._process is not None
        return Path(f"/proc/{self._process.pid}/root") / path.relative_to("/")

    def processes(self, *words: str) -> list[Process]:
        """The processes of the nodes, without slurmd, whose command line holds all `words`."""
        spaces = {file.read_text().strip(): file.stem for file in self.root.glob("nodes/*.pidns")}
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                node = spaces.get(os.readlink(entry / "ns" / "pid"))
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
            if node and command and not command.startswith(("slurmd ", f"bash {__file__[:-8]}")):
                if "virtual_cluster.sh" not in command and all(w in command for w in words):
                    found.append(Process(int(entry.name), node, command))
        return found

    def _write_files(self) -> None:
        self.root.chmod(0o755)  # munged refuses a socket in a folder that is not
        for folder in ("log", "state", "nodes", "dev", "local", "small"):
            (self.root / folder).mkdir(parents=True)
        for number in range(1, NODES + 1):
            (self.root / "nodes" / f"node{number}").mkdir()
        conf = CONF.format(root=self.root, cpus=CPUS, gpus=GPUS)
        (self.root / "slurm.conf").write_text(conf)
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for number in range(GPUS):
            os.mknod(self.root / "dev" / f"nvidia{number}", 0o666 | 0o020000, os.makedev(1, 3))
        lines = [
            f"NodeName=node[1-{NODES}] Name=gpu Type=a100 File={self.root}/dev/nvidia[0-{GPUS - 1}]"
            " Flags=nvidia_gpu_env",
        ]
        (self.root / "gres.conf").write_text("\n".join(lines) + "\n")
        hosts = ["127.0.0.1 localhost", "10.77.0.254 controller"]
        hosts += [f"10.77.0.{number} node{number}" for number in range(1, NODES + 1)]
        (self.root / "hosts").write_text("\n".join(hosts) + "\n")
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _wait_until_idle(self) -> None:
        def idle() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, f"the cluster has ended: {self._log()}"
            if not (self.root / "started").exists():
                return False
            states = self.run("sinfo", "-h", "-p", "batch,side", "-o", "%T %D").stdout.split()
            return states == ["idle", str(NODES)]

        try:
            wait_for(idle, seconds=60, what="idle nodes")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self._log()}") from None

    def _log(self) -> str:
        lines = (self.root / "log" / "cluster.log").read_text().splitlines()
        return "; ".join(lines[-3:]) or "nothing in its log"


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Polls until the condition holds; fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s"
        time.sleep(0.2)


def require_namespaces() -> None:
    """Raises `Unavailable` where this process may not make what a cluster lives in."""
    if os.geteuid() != 0:
        raise Unavailable("namespaces and slurmd need root")
    make = "ip link add bridge0 type bridge && mount -t tmpfs tmpfs /mnt && mknod /mnt/x c 1 3"
    done = subprocess.run(
        ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "sh", "-c", make],
        capture_output=True,
        text=True,
        timeout=30,
    )
    if done.returncode != 0:
        raise Unavailable(f"no namespaces: {done.stderr.strip()}")


def require_commands() -> None:
    """Installs Slurm from Debian's packages where it is missing. Raises `Unavailable`."""
    if all(map(shutil.which, COMMANDS)):
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"there is no apt-get to install {', '.join(PACKAGES)} with")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    for commands in ([install], [["apt-get", "update"], install]):
        done = [
            subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
            for command in commands
        ]
        if done[-1].returncode == 0:
            return
    raise Unavailable(f"apt-get cannot install Slurm: {done[-1].stderr.strip()[-300:]}")
