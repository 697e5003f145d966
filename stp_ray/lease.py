"""One driver at a time for a run's folder.

The lease is a row of numbered files that are only ever created: whoever creates the next number
holds the run until it creates the one after it, within `DURATION`. Nobody compares clocks: a
newcomer watches whether the number moves, and takes the next one if it does not [ours].
"""

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from .artifacts import Store
from .errors import RunError, StorageError

log = logging.getLogger(__name__)

#: Seconds without a renewal after which a lease has lapsed.
DURATION = 10.0
#: Seconds for which a driver that ends waits for storage to hear of it; else its lease lapses.
LEAVING = 5.0

_PREFIX = "lease-"


@dataclass(frozen=True)
class Holder:
    """What the newest file of a lease says."""

    number: int
    owner: str
    """Names one driver; nobody else has it."""
    host: str
    pid: int
    renewed: str
    """When, in UTC and by the holder's clock; for people to read."""
    released: bool
    """Whether the driver ended and left the run to whoever comes next."""

    @property
    def name(self) -> str:
        """Which driver this is, for people."""
        return f"process {self.pid} on {self.host}"


def holder(run: Store) -> Holder | None:
    """Who has the run, or had it last; None if nobody ever did."""
    store, tries = run.child("lease"), 0
    while names := store.names(_PREFIX):
        try:
            content = store.read_json(names[-1])
        except StorageError:
            tries += 1
            if store.exists(names[-1]):
                if tries > 20:
                    raise
                time.sleep(0.05)  # without hard links a file is seen while it is written
            continue  # or the holder has moved on and deleted it
        return Holder(number=int(names[-1].removeprefix(_PREFIX).partition(".")[0]), **content)
    return None


@contextlib.contextmanager
def held(run: Store, duration: float = DURATION) -> Iterator["Lease"]:
    """Hold the run's lease while the block runs. One that lapsed is waited for and taken over.

    If another driver takes the run over, because this one was cut off from the storage or stood
    still for longer than the lease lasts, the block is interrupted in the main thread; in any
    other, `Lease.require` says so.

    Args:
        run: the run's folder.
        duration: seconds without renewal after which the lease lapses.

    Raises:
        RunError: another driver is alive and renews its lease, or took the run over.
    """
    lease = Lease(run, duration)
    lease.acquire()
    try:
        with _heard(lease):
            yield lease
    except KeyboardInterrupt:
        if lease.lost:  # else it was the user, as far as anybody knows
            with contextlib.suppress(StorageError):
                lease.require()  # says so
        raise
    finally:
        lease.release()


@contextlib.contextmanager
def _heard(lease: "Lease") -> Iterator[None]:
    """A command that a shell starts in the background ignores interruptions: for as long as the
    block runs, it ignores only those of others."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return

    def interrupted(*_: object) -> None:
        if lease.lost:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Lease:
    """The right to drive a run. Use `held`."""

    def __init__(self, run: Store, duration: float) -> None:
        self._run, self._store, self._duration = run, run.child("lease"), duration
        self._owner = uuid.uuid4().hex
        self._number = 0
        #: Whether another driver is known to have taken the run over.
        self.lost = False
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease, once it is free or has lapsed.

        Raises:
            RunError: it is being renewed by another driver.
        """
        while True:
            found = holder(self._run)
            if found is not None and not found.released:
                self._wait_for_lapse(found)
            self._number = found.number if found else 0
            if self._renew():
                break
        here = threading.current_thread()
        self._thread = threading.Thread(target=self._keep, args=(here,), name="lease", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Before anything final is written.

        Raises:
            RunError: this driver does not hold the run any more.
            StorageError: it cannot renew its lease.
        """
        if not self.lost:  # asked each time, for the clock of a machine that slept stood still
            self.lost = not self._renew()
        if self.lost:
            found = holder(self._run)
            raise RunError(
                f"{found.name if found else 'another driver'} took over {self._run.uri} while this "
                f"one did not renew its lease for {self._duration:g} s; expected one driver for a "
                "run; let the other one finish"
            )

    def release(self) -> None:
        """Leave the run to whoever comes next; nothing happens if the lease was lost. Storage that
        does not answer is not waited for: the lease lapses."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(LEAVING)

    def _wait_for_lapse(self, found: Holder) -> None:
        log.warning("waiting up to %g s for the lease of %s to lapse", self._duration, found.name)
        started = time.monotonic()
        while time.monotonic() - started < self._duration:
            time.sleep(self._duration / 20)
            now = holder(self._run)
            if now is None or now.released:
                return
            if now.number != found.number:
                raise RunError(
                    f"{self._run.uri} is being driven by {now.name}, which renewed its lease at "
                    f"{now.renewed}; expected no other driver; wait until it ends or stop it, then "
                    "the same command goes on"
                )

    def _renew(self, released: bool = False) -> bool:
        """Create the next number; False if somebody else has done so."""
        content = {
            "owner": self._owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "renewed": datetime.now(UTC).isoformat(timespec="seconds"),
            "released": released,
        }
        data = json.dumps(content).encode()
        with self._renewing:
            while not self._store.create_bytes(_name(self._number + 1), data):
                found = holder(self._run)
                if found is None or found.owner != self._owner or found.number <= self._number:
                    return False
                # ours: it was written, though the storage answered with an error
                self._number = found.number
            # The number may have been there and be gone again, for a holder deletes those that it
            # has used: then it has left newer ones.
            newest = holder(self._run)
            if newest is not None and newest.owner != self._owner:
                with contextlib.suppress(StorageError):
                    self._store.delete(_name(self._number + 1))
                return False
            self._number += 1
            with contextlib.suppress(StorageError):
                self._store.delete(_name(self._number - 1))
        return True

    def _keep(self, driver: threading.Thread) -> None:
        while not self._ended.wait(self._duration / 4):
            try:
                if self._renew():
                    continue
            except Exception as error:  # whatever it is, another driver waits until it lapses
                log.warning("the lease was not renewed, trying again: %s", error)
                continue
            self.lost = True
            # What comes after the block is none of the lease's.
            if driver is threading.main_thread() and not self._ended.is_set():
                # a real signal, to wake it from whatever it waits for
                signal.pthread_kill(driver.ident or 0, signal.SIGINT)
            return
        if not self.lost:  # here, where storage that is away keeps nobody waiting
            with contextlib.suppress(Exception):
                self._renew(released=True)


def _name(number: int) -> str:
    return f"{_PREFIX}{number:08d}.json"
