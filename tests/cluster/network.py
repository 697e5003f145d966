"""Machines of a cluster as network namespaces on one bridge: links are cut, machines killed."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.stages.runs import Process, environment

#: The range for benchmarks of networks (RFC 2544), which nobody routes.
_SUBNET = "198.18.77"
HOST = f"{_SUBNET}.254"
RAY_PORT = 6379

#: A cut link is noticed after six seconds instead of a minute.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
}


def ip(*arguments: str) -> str:
    """Output of the `ip` command, which must succeed."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


class Network:
    """A bridge, reachable from here at `HOST`, and the machines on it."""

    def __init__(self) -> None:
        # process numbers are the same in several namespaces of them
        self._bridge = f"stp{secrets.token_hex(3)}"
        self.machines: list[Machine] = []
        ip("link", "add", self._bridge, "type", "bridge")
        ip("address", "add", f"{HOST}/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")

    def machine(self, folder: Path, **variables: str) -> "Machine":
        """One more machine. Its commands get these environment variables."""
        number = len(self.machines) + 1
        machine = Machine(f"{self._bridge}-{number}", f"{_SUBNET}.{number}", folder, variables)
        self.machines.append(machine)
        machine.plug(self._bridge)
        return machine

    def close(self) -> None:
        """End every process on every machine, and take all away."""
        while self.machines:
            self.machines.pop().close()
        with contextlib.suppress(RuntimeError):  # it may have gone before
            ip("link", "delete", self._bridge)


class Machine:
    """A namespace with one address."""

    def __init__(self, name: str, address: str, folder: Path, variables: dict[str, str]) -> None:
        self.name, self.address, self._folder = name, address, folder
        self._link = f"v{name.removeprefix('stp')}"
        #: Where its own disk is seen from here, if it has one.
        self.disk: Path | None = None
        self._variables = environment(GLOO_SOCKET_IFNAME="eth0", **HEALTH, **variables)
        self._started: list[Process] = []
        # Nobody answers for names here: whoever asked (gloo does) would wait for ten seconds.
        self._settings = Path("/etc/netns", name)  # `ip netns exec` lays it over /etc
        self._settings.mkdir(parents=True, exist_ok=True)
        (self._settings / "nsswitch.conf").write_text("hosts: files\n")
        ip("netns", "add", name)

    def plug(self, bridge: str) -> None:
        ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self._link, "master", bridge, "up")
        inside = ("-n", self.name)
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        ip(*inside, "link", "set", "eth0", "up")
        # Leads nowhere, but by it a process finds the address of its own machine.
        ip(*inside, "route", "add", "default", "via", HOST)

    def start(self, *command: str) -> Process:
        """Start a command here."""
        log = self._folder / f"{self.name}-{len(self._started)}.log"
        everything = ["ip", "netns", "exec", self.name, *command]
        process = Process(everything, log, env=self._variables, cwd=self._folder)
        self._started.append(process)
        return process

    def pids(self, name: str) -> list[int]:
        """Processes here whose command lines begin with this name."""
        found = []
        for pid in ip("netns", "pids", self.name).split():
            with contextlib.suppress(OSError):
                if Path("/proc", pid, "cmdline").read_bytes().startswith(name.encode()):
                    found.append(int(pid))
        return found

    def runs(self, name: str) -> bool:
        """Whether a process whose command line begins with this name runs here."""
        return bool(self.pids(name))

    def cut(self) -> None:
        """Nothing gets out or in any more."""
        ip("link", "set", self._link, "down")

    def mend(self) -> None:
        """The link is there again."""
        ip("link", "set", self._link, "up")

    def fail(self) -> list[str]:
        """The power fails: SIGKILL to all that runs here, at once; what it was."""
        pids = ip("netns", "pids", self.name).split()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        return pids

    def kill(self) -> None:
        """The power fails; returns when nothing runs any more."""
        deadline = time.monotonic() + 20
        while pids := self.fail():
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {pids} in {self.name} outlive SIGKILL")
            time.sleep(0.1)

    def close(self) -> None:
        self.kill()
        for process in self._started:
            process.end()
        ip("link", "delete", self._link)  # the namespace goes later, when the kernel comes to it
        ip("netns", "delete", self.name)
        shutil.rmtree(self._settings)
