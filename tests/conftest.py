import uuid
from pathlib import Path

import pytest
from hypothesis import settings

from stp_ray.artifacts import Store

# The first example of a test may import or compile; time is pytest's affair.
settings.register_profile("stp_ray", deadline=None)
settings.load_profile("stp_ray")

STAGES = Path(__file__).parent / "stages"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items):
    """The stages' tests, which start whole clusters, run one at a time and share the run that
    nothing disturbs; all others run beside them."""
    for item in items:
        if STAGES in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("stages"))


@pytest.fixture(scope="module")
def s3():
    """A bucket on a moto server; its address and fake keys are in one module's environment."""
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # those of another module know its server
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="artifacts")
        try:
            yield "s3://artifacts"
        finally:
            server.stop()


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return Store(tmp_path / "run")
    if request.param == "memory":
        return Store(f"memory://{uuid.uuid4().hex}/run")
    return Store(f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}")
