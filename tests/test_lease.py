"""Two drivers on one run: the living one keeps it, a dead one's is taken over after a while."""

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time

import pytest

from stp_ray.artifacts import Store
from stp_ray.errors import RunError, StorageError
from stp_ray.lease import Lease, held, holder

pytestmark = pytest.mark.timeout(120)

SHORT = 0.8


def test_nobody_holds_a_new_run_and_a_finished_one_is_released(store):
    assert holder(store) is None
    with held(store, SHORT):
        now = holder(store)
        assert (now.pid, now.released) == (os.getpid(), False)
        assert now.host in now.name
    assert holder(store).released
    started = time.monotonic()
    with held(store, duration=60):
        pass
    assert time.monotonic() - started < 20, "a released lease is not waited for"


def test_a_lease_is_renewed_and_leaves_no_row_of_files(store):
    with held(store, SHORT) as lease:
        first = holder(store).number
        time.sleep(3 * SHORT)
        lease.require()
        assert holder(store).number > first + 2
        assert len(store.child("lease").names()) <= 2
    assert len(store.child("lease").names()) == 1


def test_a_living_driver_is_not_pushed_aside(store):
    with held(store, SHORT) as lease:
        with pytest.raises(RunError, match=f"driven by process {os.getpid()} on") as refused:
            Lease(store, duration=3 * SHORT).acquire()
        assert refused.value.exit_code == 1
        lease.require()


def hold_for_ever(uri, ready):
    with held(Store(uri), SHORT):
        ready.set()
        time.sleep(600)


@pytest.fixture
def other(tmp_path):
    """A driver in another process."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold_for_ever, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(90)
    yield process
    process.kill()
    process.join()


def test_the_lease_of_a_dead_driver_lapses(other, tmp_path, caplog):
    other.kill()
    other.join()
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), held(Store(tmp_path), SHORT):
        assert SHORT <= time.monotonic() - started < SHORT + 20
        assert holder(Store(tmp_path)).pid == os.getpid()
    assert f"process {other.pid}" in caplog.text


@pytest.mark.parametrize("renewals", [0, 1, 4])
def test_a_driver_that_stood_still_finds_that_it_was_replaced(tmp_path, renewals):
    """However far the other one has come, which deletes the numbers that it has used."""
    store = Store(tmp_path)
    still = Lease(store, SHORT)
    still._renew()  # holds it, and then renews it no more, as if it were stopped
    with held(store, SHORT) as lease:
        first = holder(store).number
        while holder(store).number < first + renewals:
            time.sleep(SHORT / 20)
        with pytest.raises(RunError, match=f"process {os.getpid()} on .* took over"):
            still.require()
        lease.require()
        still.release()
        lease.require()
        assert holder(store).owner == lease._owner


def test_a_machine_that_slept_finds_that_it_was_replaced(tmp_path):
    """Its clock stood still: by that its lease was renewed just now."""
    store = Store(tmp_path)
    slept = Lease(store, duration=60)
    assert slept._renew()
    late = Lease(store, duration=60)
    late._number = holder(store).number
    assert late._renew()
    with pytest.raises(RunError, match="took over"):
        slept.require()


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def at_interruptions(request):
    """What a driver does at SIGINT that a terminal started, or a shell in the background."""
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param
    assert signal.signal(signal.SIGINT, before) is request.param


def test_the_block_is_interrupted_when_another_driver_takes_over(tmp_path, at_interruptions):
    store = Store(tmp_path)

    def take_over():
        time.sleep(SHORT)
        number = holder(store).number
        content = {"owner": "x", "host": "elsewhere", "pid": 7, "renewed": "", "released": False}
        for place in range(number + 1, number + 9):
            store.child("lease").create_bytes(
                f"lease-{place:08d}.json", json.dumps(content).encode()
            )

    thread = threading.Thread(target=take_over)
    started = time.monotonic()
    with pytest.raises(RunError, match="process 7 on elsewhere took over"), held(store, SHORT):
        thread.start()
        time.sleep(60)
    thread.join()
    assert time.monotonic() - started < 30


def test_an_interruption_by_the_user_stays_what_it_was(tmp_path, at_interruptions):
    heard = at_interruptions is not signal.SIG_IGN
    expected = pytest.raises(KeyboardInterrupt) if heard else contextlib.nullcontext()
    with expected, held(Store(tmp_path), SHORT):
        signal.raise_signal(signal.SIGINT)
    assert holder(Store(tmp_path)).released


def test_an_interruption_stays_one_where_storage_is_away(tmp_path, monkeypatch):
    def away(self, name, data):
        raise StorageError("the storage is away")

    with pytest.raises(KeyboardInterrupt), held(Store(tmp_path), duration=60):
        monkeypatch.setattr(Store, "create_bytes", away)
        raise KeyboardInterrupt


@pytest.mark.parametrize("renewing", [False, True])
def test_an_interruption_does_not_wait_for_storage_that_stays_away(tmp_path, monkeypatch, renewing):
    """Whether or not a renewal is under way."""
    asked, over = threading.Event(), threading.Event()

    def away(self, name, data):
        asked.set()
        over.wait(20)
        raise StorageError("the storage is away")

    monkeypatch.setattr("stp_ray.lease.LEAVING", 0.3)
    with pytest.raises(KeyboardInterrupt), held(Store(tmp_path), SHORT if renewing else 60):
        monkeypatch.setattr(Store, "create_bytes", away)
        assert not renewing or asked.wait(60)
        started = time.monotonic()
        raise KeyboardInterrupt
    took = time.monotonic() - started
    over.set()
    assert took < 10


def test_what_comes_after_a_run_is_not_interrupted(tmp_path, monkeypatch):
    """By the end of a renewal that storage kept waiting, while another driver took over."""
    create, asked, over = Store.create_bytes, threading.Event(), threading.Event()

    def away(self, name, data):
        asked.set()
        over.wait(20)
        return create(self, name, data)

    monkeypatch.setattr("stp_ray.lease.LEAVING", 0.1)
    with held(Store(tmp_path), SHORT) as lease:
        monkeypatch.setattr(Store, "create_bytes", away)
        assert asked.wait(60)
    monkeypatch.setattr(Store, "create_bytes", create)
    try:
        with held(Store(tmp_path), SHORT):
            over.set()
            lease._thread.join(20)
    except KeyboardInterrupt:
        pytest.fail("interrupted")
    assert lease.lost


@pytest.mark.parametrize("error", [StorageError, RuntimeError])
def test_storage_that_is_away_for_a_moment_loses_no_lease(tmp_path, monkeypatch, error):
    store = Store(tmp_path)
    with held(store, duration=2.0) as lease:
        real = Store.create_bytes

        def away(self, name, data):
            raise error("the storage is away")

        monkeypatch.setattr(Store, "create_bytes", away)
        time.sleep(1.0)
        monkeypatch.setattr(Store, "create_bytes", real)
        number = holder(store).number
        time.sleep(1.0)
        lease.require()
        assert holder(store).number > number, "it is renewed again"


def test_a_renewal_whose_answer_was_lost_is_known_again(tmp_path, monkeypatch):
    store = Store(tmp_path)
    lease = Lease(store, duration=60)
    assert lease._renew()
    create = Store.create_bytes

    def lost(self, name, data):
        create(self, name, data)
        raise StorageError("written, but nobody said so")

    monkeypatch.setattr(Store, "create_bytes", lost)
    with pytest.raises(StorageError):
        lease._renew()
    monkeypatch.setattr(Store, "create_bytes", create)
    time.sleep(1.1)  # the next one says another time, so it is not the same file
    assert lease._renew()
    assert holder(store).number == 3
    lease.require()


def test_two_renewals_at_once_are_two_numbers(tmp_path, monkeypatch):
    store = Store(tmp_path)
    lease = Lease(store, duration=60)
    create = Store.create_bytes

    def slow(self, name, data):
        time.sleep(0.2)  # long enough for the other one to ask for the same number
        return create(self, name, data)

    monkeypatch.setattr(Store, "create_bytes", slow)
    renewed = []
    threads = [threading.Thread(target=lambda: renewed.append(lease._renew())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert renewed == [True] * 4
    assert holder(store).number == 4


def test_outside_of_the_main_thread_nobody_else_is_interrupted(tmp_path):
    store = Store(tmp_path)
    ended = []

    def drive():
        try:
            with held(store, SHORT) as lease:
                taken.wait(60)
                time.sleep(2 * SHORT)
                lease.require()
        except RunError as error:
            ended.append(error)

    taken = threading.Event()
    thread = threading.Thread(target=drive)
    thread.start()
    while holder(store) is None:
        time.sleep(SHORT / 20)
    content = {"owner": "x", "host": "elsewhere", "pid": 7, "renewed": "", "released": False}
    for place in range(holder(store).number + 1, holder(store).number + 9):
        store.child("lease").create_bytes(f"lease-{place:08d}.json", json.dumps(content).encode())
    taken.set()
    thread.join(60)
    assert "process 7 on elsewhere took over" in str(ended[0])
