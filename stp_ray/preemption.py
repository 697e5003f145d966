"""Turn a cloud's notice that it takes a spot machine away into `ray drain-node`.

    python preemption.py aws|gcp|azure|now

The launcher files start it on every worker, beside Ray, as this one file: it uses the standard
library alone. Ray then places nothing new on the node, and tells a training that it goes away.
"""

import argparse
import json
import logging
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path

log = logging.getLogger("preemption")

#: The address of the metadata service, the same in all three clouds.
METADATA = "http://169.254.169.254"

#: Seconds between two looks. The shortest notice is 30 s.
POLL_S = 5.0
#: Seconds that a request may take; Azure's first one is slow.
TIMEOUT_S = 10.0
#: How often a drain that fails is tried, and the seconds that each try may take.
ATTEMPTS = 3
DRAIN_S = 20.0

PROC = Path("/proc")

# Never through a proxy: the service answers this machine only.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def aws(metadata: str = METADATA) -> float | None:
    """Seconds until EC2 takes this instance away, or None without a notice; two minutes at most.

    Source: EC2 User Guide, "Spot Instance interruption notices", with IMDSv2.
    """
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _ask(f"{metadata}/latest/api/token", ttl, "PUT")
    header = {"X-aws-ec2-metadata-token": token}
    try:
        answer = _ask(f"{metadata}/latest/meta-data/spot/instance-action", header)
    except urllib.error.HTTPError as error:
        if error.code == 404:  # no notice
            return None
        raise
    return _until(datetime.fromisoformat(json.loads(answer)["time"]))


def gcp(metadata: str = METADATA) -> float | None:
    """Seconds until Compute Engine stops this machine, or None without a notice.

    Source: Compute Engine, "Preemptible VM instances": 30 seconds from the notice.
    """
    header = {"Metadata-Flavor": "Google"}
    answer = _ask(f"{metadata}/computeMetadata/v1/instance/preempted", header)
    return 30.0 if answer.strip().upper() == "TRUE" else None


def azure(metadata: str = METADATA) -> float | None:
    """Seconds until Azure evicts this machine, or None without a notice; 30 s at least.

    Source: Azure, "Scheduled Events for Linux VMs", events of type Preempt.
    """
    header = {"Metadata": "true"}
    answer = _ask(f"{metadata}/metadata/scheduledevents?api-version=2020-07-01", header)
    events = [e for e in json.loads(answer).get("Events", []) if e["EventType"] == "Preempt"]
    if not events:
        return None
    where = f"{metadata}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
    name = _ask(where, header)
    for event in events:
        if name in event["Resources"]:
            begins = event.get("NotBefore")  # empty once it has begun
            return _until(parsedate_to_datetime(begins)) if begins else 0.0
    return None


NOTICES: dict[str, Callable[[str], float | None]] = {
    "aws": aws,
    "gcp": gcp,
    "azure": azure,
    "now": lambda metadata: 25.0,  # Kubernetes has given it already: terminationGracePeriodSeconds
}


def watch(notice: Callable[[], float | None], poll_s: float = POLL_S) -> float:
    """Wait for a notice, for as long as it takes.

    A service that does not answer is asked again: this must not end before the machine does.

    Args:
        notice: seconds left, or None.
        poll_s: seconds between two looks.

    Returns:
        The seconds left.
    """
    odd = (ValueError, KeyError, TypeError, AttributeError)  # an answer of another form
    silent = False
    while True:
        try:
            left = notice()
            silent = False
        except (OSError, HTTPException, *odd) as error:
            left = None
            if not silent:
                log.warning("no answer from the metadata service (%s); asking on", error)
            silent = True
        if left is not None:
            return left
        time.sleep(poll_s)


def nodes(proc: Path = PROC) -> list[tuple[str, str]]:
    """The Ray nodes on this machine as (address of the cluster, node id), from the command lines of
    their raylets. Left to itself, `ray drain-node` may take another node for this one."""
    found = []
    for path in proc.glob("[0-9]*/cmdline"):
        try:
            program, *arguments = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        flags = dict(argument.partition("=")[::2] for argument in arguments)
        if program.rpartition("/")[2] == "raylet" and "--node_id" in flags:
            found.append((flags["--gcs-address"], flags["--node_id"]))
    return found


def drain(seconds: float, proc: Path = PROC, pause_s: float = 1.0) -> bool:
    """Tell Ray that this machine goes away.

    Args:
        seconds: until it does.
        proc: where the processes of this machine are listed.
        pause_s: between two attempts.

    Returns:
        Whether Ray accepted it.
    """
    ends = time.monotonic() + seconds
    for _ in range(ATTEMPTS):
        here = nodes(proc)
        if here and all([_drain(*node, ends - time.monotonic()) for node in here]):
            return True
        if not here:
            log.warning("found no raylet; expected Ray to run here")
        time.sleep(pause_s)
    return False


def _drain(address: str, node: str, seconds: float) -> bool:
    command = [
        "ray", "drain-node", "--address", address, "--node-id", node,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "the cloud takes this spot machine away",
        "--deadline-remaining-seconds", str(max(0, int(seconds))),
    ]  # fmt: skip
    try:
        subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True,
            timeout=DRAIN_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:  # the first: there is no such program
        said = str(getattr(error, "stdout", None) or "nothing").strip()[-500:]
        log.warning("%s is not drained (%s); ray said: %s", node, error, said)
        return False
    log.info("drained %s, %.0f s before the end", node, seconds)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Watch, drain once, and end."""
    parser = argparse.ArgumentParser(description="Drain this Ray node when its machine is taken.")
    parser.add_argument("cloud", choices=NOTICES)
    parser.add_argument("--metadata", default=METADATA, help="Another metadata service, for tests.")
    parser.add_argument("--proc", type=Path, default=PROC, help="Another /proc, for tests.")
    parser.add_argument("--poll", type=float, default=POLL_S, help="Seconds between two looks.")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    left = watch(lambda: NOTICES[given.cloud](given.metadata), given.poll)
    log.info("notice: this machine is taken away in %.0f s", left)
    return 0 if drain(left, given.proc) else 1


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with _open(request, timeout=TIMEOUT_S) as answer:
        content: bytes = answer.read()
    return content.decode()


def _until(when: datetime) -> float:
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


if __name__ == "__main__":
    raise SystemExit(main())
