import logging
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stages.runs import Process, environment, files, stp, tiny, write_recipe


@pytest.fixture(autouse=True)
def one_thread():
    """As many threads as a worker of the tiny recipe has: sums depend on it in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start():
    """Starts commands in sessions of their own, and ends all that is left of them."""
    if not sys.platform.startswith("linux"):
        pytest.skip("finds the processes of a session through /proc")
    started: list[Process] = []

    def begin(*arguments: Any, **options: Any) -> Process:
        started.append(Process(*arguments, **options))
        return started[-1]

    yield begin
    for process in started:
        process.end()


@dataclass(frozen=True)
class Finished:
    """A run that nothing disturbed, in a bucket.

    Attributes:
        bucket: name -> content of everything in the bucket.
        recipe: path of its recipe.
        outside: what the driver left in its folders "cwd", "home" and "temporary".
        output: what it printed.
        leaks: names of whatever it left anywhere that holds one of its keys.
    """

    bucket: dict[str, bytes]
    recipe: Path
    outside: dict[str, set[str]]
    output: str
    leaks: set[str]

    @property
    def run_id(self) -> str:
        (found,) = {name.split("/")[1] for name in self.bucket}
        return found

    @property
    def files(self) -> dict[str, bytes]:
        """name in the run's folder -> content."""
        prefix = f"runs/{self.run_id}/"
        return {name.removeprefix(prefix): data for name, data in self.bucket.items()}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The tiny recipe on two data-parallel workers, through Ray, into S3: the run that every
    disturbed one is compared with."""
    if not sys.platform.startswith("linux"):
        pytest.skip("finds the processes of a session through /proc")
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    folder = tmp_path_factory.mktemp("undisturbed")
    longer = {"optimisation": {"epochs": 6}}  # for a kill to come in the middle
    content = tiny(cluster={"num_workers": 2}, supernet=longer, finalize=longer)
    recipe = write_recipe(folder, content)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {
        "AWS_ACCESS_KEY_ID": "AKIAPLANTED000000002",
        "AWS_SECRET_ACCESS_KEY": "planted/secret+key",
        "WANDB_API_KEY": "feed0123456789feed0123456789feed01234567",
    }
    # Sockets lie in the folder of temporary files: its path has to be short.
    with tempfile.TemporaryDirectory(prefix="stp-", dir="/tmp") as temporary:
        folders = {"cwd": folder / "cwd", "home": folder / "home", "temporary": Path(temporary)}
        for path in folders.values():
            path.mkdir(exist_ok=True)
        variables = {name: v for name, v in environment().items() if not name.startswith("XDG_")}
        variables |= {
            **keys,
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "HOME": str(folders["home"]),
            "TMPDIR": temporary,
        }
        client = boto3.client(
            "s3",
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket="experiments")
        arguments = ("run", str(recipe), "storage=s3://experiments/runs")
        driver = Process(stp(*arguments), folder / "log", cwd=folders["cwd"], env=variables)
        try:
            code = driver.wait(600)
        finally:
            driver.end()
            pages = client.get_paginator("list_objects_v2").paginate(Bucket="experiments")
            names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
            bucket = {
                name: client.get_object(Bucket="experiments", Key=name)["Body"].read()
                for name in names
            }
            server.stop()
        assert code == 0, driver.output
        outside = {name: files(path) for name, path in folders.items()}
        # Ray's logs are among them.
        left = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
        left |= {path: path.read_bytes() for path in Path(temporary).rglob("*") if path.is_file()}
        left |= bucket
    secrets = [value.encode() for value in keys.values()]
    leaks = {str(name) for name, data in left.items() if any(s in data for s in secrets)}
    return Finished(bucket, recipe, outside, driver.output, leaks)
