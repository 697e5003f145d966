"""Another library's subnets are the same as ours; without the library its action is skipped."""

import argparse
import sys

import pytest
import torch


@pytest.fixture
def autonas(setting):
    from measure import autonas

    return autonas


def test_one_line_where_the_library_is_missing(autonas, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "modelopt", None)
    chosen = argparse.Namespace(
        model="resnet20", draws=1, repeats=1, workers=1, processor_time=True
    )
    with pytest.raises(SystemExit) as end:
        next(autonas.measure(chosen, torch.device("cpu")))
    assert not end.value.code
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("skipped: found no nvidia-modelopt") and "autonas.py" in line


def test_a_configuration_is_a_subnet(autonas, setting):
    space = setting.Setting("resnet20", torch.device("cpu")).net.space
    config = {f"{axis.name}.out_channels": axis.size for axis in space.axes}
    config |= {"layer1.depth": 3, "layer2.depth": 3, "layer3.depth": 3}
    assert autonas.same(space, config) == space.full
    first = space.axes[0]
    config |= {f"{first.name}.out_channels": first.choices[0], "layer3.depth": 1}
    subnet = autonas.same(space, config)
    assert subnet.widths[first.name] == first.choices[0]
    assert subnet.dropped == {"layer3.1", "layer3.2"}


def test_other_answers_are_found(autonas, setting):
    chosen = setting.Setting("resnet20", torch.device("cpu"))
    autonas.check(chosen, chosen.net.space.full, chosen.dense.train())
    with pytest.raises(RuntimeError, match="expected those of"):
        autonas.check(chosen, chosen.net.space.smallest, chosen.dense.train())


def test_the_table_names_the_version_and_every_way(autonas):
    ways = {"ours": 1.01, "autonas": 1.25}
    line = {
        "model": "resnet50", "size": 96, "batch": 16, "subnets": 1, "workers": 2, "dense_s": 1.5,
        "device": "x86_64", "threads": 1, "clock": "processor", "others": 0.0,
        "ratio": ways, "quartiles": {way: [1.0, 1.5] for way in ways},
        "macs": 0.512, "modelopt": "0.47.0",
    }  # fmt: skip
    text = "\n".join(autonas.table([line]))
    assert "`nvidia-modelopt` 0.47.0" in text and "(median share of the MACs: 0.51)" in text
    assert "| ours | autonas |" in text
    assert "processor time | 1.500 | 1.01 (1.00, 1.50) | 1.25 (1.00, 1.50) |" in text
