"""A Slurm of two nodes for one test session: its own folder, ports and keys, started in a second, gone afterwards.

Where the kernel lets us, ``n1`` and ``n2`` are network namespaces with their own addresses and host names, so that a
job sees two hosts; elsewhere both stand on loopback.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2")
CPUS = 2


def missing() -> str | None:
    """Return why a Slurm cannot be started on this machine; None if it can."""
    lacking = [name for name in ("slurmctld", "slurmd", "munged", "srun", "sbatch") if shutil.which(name) is None]
    if lacking:
        return f"needs Slurm and munge (no {', '.join(lacking)})"
    return None if os.geteuid() == 0 else "needs root to start a Slurm"


EVERYWHERE = {
    # Neither systemd nor control groups.
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "JobAcctGatherType": "jobacct_gather/none",
    "AccountingStorageType": "accounting_storage/none",
    "SwitchType": "switch/none",
    "MpiDefault": "none",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "ReturnToService": 2,
    "SlurmdParameters": "config_overrides",  # the cores that we say, not those that there are
    "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0,requeue_delay=1",
    "SlurmdTimeout": 60,
}
"""Settings that are the same for every Slurm of the tests."""


class PrivateSlurm:
    """``start`` it, give it commands by ``run``, ``stop`` it. Every command has a time limit of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"
        self.network: Network | None = None
        self.address = "127.0.0.1"
        self.environment = {**os.environ, "SLURM_CONF": str(self.config)}

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        for name in ("state", "spool", "log", "run"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        self._key()
        try:
            self.network = Network(self.folder)
            self.address = self.network.address
        except (OSError, subprocess.SubprocessError):
            # gloo looks its own host name up, which need not be one that others can reach.
            self.environment |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
        self.config.write_text(self._configuration())
        run, log = self.folder / "run", self.folder / "log"
        self._daemon(
            *("munged", "--force", f"--key-file={self.folder / 'key'}", f"--socket={run / 'munge'}"),
            *(f"--pid-file={run / 'munged.pid'}", f"--log-file={log / 'munged'}", f"--seed-file={run / 'seed'}"),
        )
        self._daemon("slurmctld", "-f", str(self.config))
        for node in NODES:
            (self.folder / "spool" / node).mkdir()
            inside = self.network.inside(node) if self.network else []
            self._daemon(*inside, "slurmd", "-f", str(self.config), "-N", node)
        self.wait_for(lambda: self.nodes_in("idle") == len(NODES), 30, "the nodes")

    def _key(self) -> None:
        key = self.folder / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)

    def _daemon(self, *command: str) -> None:
        # A daemon keeps what it inherits open; a pipe would never end.
        with (self.folder / "log" / "starts").open("a") as log:
            subprocess.run(
                command, check=True, timeout=30, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def _configuration(self) -> str:
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        run, log = self.folder / "run", self.folder / "log"
        ports = free_ports(1 + len(NODES))
        settings = {
            "ClusterName": "tests",
            "SlurmctldHost": f"{host}({self.network.gateway if self.network else '127.0.0.1'})",
            "SlurmctldPort": ports[0],
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            # A requeued job waits until its credential has expired, by default two minutes.
            "AuthInfo": f"socket={run / 'munge'},cred_expire=5",
            "CredType": "cred/munge",
            "SlurmctldPidFile": run / "slurmctld.pid",
            "SlurmdPidFile": run / "slurmd.%n.pid",
            "SlurmctldLogFile": log / "slurmctld",
            "SlurmdLogFile": log / "slurmd.%n",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool" / "%n",
        }
        lines = [f"{name}={value}" for name, value in (settings | EVERYWHERE).items()]
        for node, port in zip(NODES, ports[1:], strict=True):
            place = self.network.place(node) if self.network else f"NodeHostname={host} NodeAddr=127.0.0.1"
            lines.append(f"NodeName={node} {place} Port={port} CPUs={CPUS} RealMemory=8000")
        lines.append("PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60")
        lines.append("PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF")
        return "\n".join(lines) + "\n"

    def run(self, *command: str, folder: Path | None = None, **more: str) -> str:
        """Run a command of Slurm in a folder and return what it prints; ``more`` goes into its environment."""
        done = subprocess.run(
            command,
            cwd=folder or self.folder,
            env={**self.environment, **more},
            timeout=60,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {done.stderr}"
        return done.stdout

    def nodes_in(self, state: str) -> int:
        """Return how many nodes are in a state."""
        names = self.run("sinfo", "--noheader", "--Node", "--partition=low", f"--states={state}", "--format=%N")
        return len(names.split())

    def job(self, job: str) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Ask again and again until ``condition`` holds."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{what}: not within {seconds} s\n{self.run('squeue')}{self.run('sinfo')}{self._logs()}"
                )
            time.sleep(0.2)

    def wait_for_end(self, job: str, seconds: float) -> None:
        """Wait until a job is over, however it ended."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        self.wait_for(lambda: self.job(job)["JobState"] not in going, seconds, f"the end of job {job}")

    def clear(self) -> None:
        """Cancel every job, and have both nodes back."""
        self.run("scancel", "--user", getpass.getuser())
        for node in NODES:
            self.resume(node)
        self.wait_for(lambda: self.nodes_in("idle") == len(NODES), 90, "the nodes")

    def resume(self, node: str) -> None:
        """Have a node back; one that answered may be back by itself."""
        with contextlib.suppress(AssertionError):
            self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def _logs(self) -> str:
        return "".join(f"--- {path}\n{path.read_text()[-2000:]}" for path in sorted((self.folder / "log").iterdir()))

    def stop(self) -> None:
        """End the jobs and the daemons, and take the network down."""
        with contextlib.suppress(Exception):
            self.run("scancel", "--signal=KILL", "--full", "--user", getpass.getuser())
            self.run("scancel", "--user", getpass.getuser())
            self.wait_for(lambda: not self.run("squeue", "--noheader"), 20, "the last jobs")
        # A daemon removes its file at the beginning of its end.
        pids = [int(path.read_text()) for path in (self.folder / "run").glob("*.pid")]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            end = time.monotonic() + 10
            while time.monotonic() < end and any(map(is_alive, pids)):
                time.sleep(0.1)
        if self.network:
            self.network.remove()


class Network:
    """A bridge and a network namespace for each node. Raises where the kernel does not let us."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tag = f"{os.getpid():x}"
        taken = _answer("ip", "-4", "-oneline", "address")
        self.prefix = next(f"10.213.{n}" for n in range(256) if f" 10.213.{n}." not in taken)
        self.gateway = f"{self.prefix}.254"
        self.address = f"{self.prefix}.1"
        self.hosts = folder / "hosts"
        try:
            self._make()
        except BaseException:
            self.remove()
            raise

    def _make(self) -> None:
        names = {"localhost": "127.0.0.1", socket.gethostname(): self.gateway}
        names |= {node: f"{self.prefix}.{number}" for number, node in enumerate(NODES, 1)}
        self.hosts.write_text("".join(f"{address} {name}\n" for name, address in names.items()))
        bridge = f"b{self.tag}"
        _answer("ip", "link", "add", bridge, "type", "bridge")
        _answer("ip", "address", "add", f"{self.gateway}/24", "dev", bridge)
        _answer("ip", "link", "set", bridge, "up")
        for node in NODES:
            inside, outside = self._namespace(node), f"{node}{self.tag}"
            _answer("ip", "netns", "add", inside)
            _answer("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", inside)
            _answer("ip", "link", "set", outside, "master", bridge, "up")
            _answer("ip", "-netns", inside, "address", "add", f"{names[node]}/24", "dev", "eth0")
            _answer("ip", "-netns", inside, "link", "set", "eth0", "up")
            _answer("ip", "-netns", inside, "link", "set", "lo", "up")
            _answer(*self.inside(node), "true")

    def _namespace(self, node: str) -> str:
        return f"{node}-{self.tag}"

    def inside(self, node: str) -> list[str]:
        """Return the words that make a command see itself on ``node``.

        Not ``ip netns exec``, which mounts another /sys, where slurmd looks for control groups.
        """
        enter = f'hostname {node} && mount --bind {self.hosts} /etc/hosts && exec "$@"'
        namespace = f"--net=/run/netns/{self._namespace(node)}"
        return ["nsenter", namespace, "unshare", "--uts", "--mount", "bash", "-c", enter, "bash"]

    def place(self, node: str) -> str:
        """Return the node's place in slurm.conf."""
        return f"NodeHostname={node} NodeAddr={self.prefix}.{NODES.index(node) + 1}"

    def remove(self) -> None:
        """Kill what is left inside, and remove all."""
        for node in NODES:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                for pid in _answer("ip", "netns", "pids", self._namespace(node)).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                _answer("ip", "netns", "delete", self._namespace(node))
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            _answer("ip", "link", "delete", f"b{self.tag}")


def _answer(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def is_alive(pid: int) -> bool:
    """Whether a process, which is nobody's child any more, has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def free_ports(count: int) -> list[int]:
    """Return ports on which nobody listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
