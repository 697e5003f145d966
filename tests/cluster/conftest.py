"""One cluster for each module of tests."""

import os
import shutil
import sys

import pytest

from tests.cluster.cluster import bucket, opened
from tests.cluster.network import Network


@pytest.fixture(scope="module")
def cluster():
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs Linux, root and iproute2")
    pytest.importorskip("moto.server")
    pytest.importorskip("boto3")
    try:
        network = Network()
    except RuntimeError as error:
        pytest.skip(f"may not make a bridge here: {error}")
    try:
        with bucket() as (url, client), opened(network, client, url) as found:
            yield found
            network.close()  # before its folder goes
    finally:
        network.close()
