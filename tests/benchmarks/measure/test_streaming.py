"""Both sides of the comparison decode the same images, and all of them."""

import json
import os
import subprocess
import sys

import pytest

from stp_ray.data import describe, load
from tests.stages.runs import ROOT, Process, environment


@pytest.fixture
def streaming(setting):
    from measure import streaming

    return streaming


def test_the_decoder_alone_sees_every_image_of_a_file(streaming, tmp_path):
    encoded = streaming.write(tmp_path / "data", 600, 1, 16)
    assert streaming.raw(encoded, 2) == len(encoded) == 600


def test_a_larger_data_set_is_the_same_file_several_times(streaming, tmp_path):
    streaming.write(tmp_path / "data", 40, 3, 16)
    options = streaming._options(tmp_path / "data")
    summary = describe(options)
    assert summary.streams
    assert summary.train_rows + summary.holdout_rows == 120
    assert load(options).train.images.std() > 10  # pictures, not one colour


def test_processor_time_and_memory_are_those_of_children_too(setting):
    from measure import processes

    code = "x = bytearray(2**27); x[::4096] = x[::4096]\nwhile True: pass"
    before_mb, before_s = processes.memory_mb(), processes.processor_seconds()
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        from tests.stages.runs import wait_for

        wait_for(lambda: processes.family().get(child.pid, 0) > 0.2, 60, "the child to work")
        wait_for(lambda: processes.memory_mb() > before_mb + 100, 60, "its memory")
        assert processes.processor_seconds() > before_s + 0.2
        assert os.getpid() in processes.family()
    finally:
        child.kill()
        child.wait(10)


@pytest.mark.timeout(240)
def test_streaming_is_timed_beside_the_decoder(tmp_path):
    command = (
        "streaming --images 300 --times 2 --pixels 32 --store-mb 100 --repeats 1 --threads 1 --out"
    )
    program = [sys.executable, "benchmarks/speed.py", *command.split(), str(tmp_path)]
    process = Process(program, tmp_path / "log", cwd=ROOT, env=environment())
    try:
        assert process.wait(220) == 0, process.output
    finally:
        process.end()
    (line,) = map(json.loads, (tmp_path / "streaming.jsonl").read_text().splitlines())
    rates = line["images_per_s"]
    for times, ratio in line["ratio"].items():
        assert ratio == pytest.approx(rates[times] / rates["raw"], rel=0.01, abs=1e-3)
    assert (
        line["ratio"].keys() == line["peak_mb"].keys() == line["ms_an_image"].keys() == {"1", "2"}
    )
    assert all(peak > 100 for peak in line["peak_mb"].values())
