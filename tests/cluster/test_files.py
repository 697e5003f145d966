"""The cluster files, checked without a cloud: Ray's own validators, and schemas of ours."""

import copy
import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER = ["aws.yaml", "gcp.yaml"]
KUBERAY = {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob"}
SPOT_LABELS = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
}
IDLE_MINUTES = 10


def read(*parts):
    return yaml.safe_load(CLUSTER.joinpath(*parts).read_text())


def schema():
    return json.loads(Path(__file__).with_name("kuberay.schema.json").read_text())


def check(document):
    jsonschema.Draft202012Validator(schema()).validate(document)


def ray_cluster(name):
    """The cluster part of a KubeRay manifest."""
    spec = read("kuberay", name)["spec"]
    return spec.get("rayClusterSpec", spec)


def all_files():
    return sorted(path for path in CLUSTER.rglob("*") if path.is_file())


@pytest.fixture(params=LAUNCHER)
def launcher(request):
    return read(request.param)


@pytest.fixture(params=KUBERAY)
def cluster(request):
    return ray_cluster(request.param)


# -- Ray's cluster launcher


def test_ray_accepts_the_launcher_files(launcher):
    util = pytest.importorskip("ray.autoscaler._private.util")
    util.validate_config(util.prepare_config(copy.deepcopy(launcher)))
    launcher["idle_timeout"] = 5
    with pytest.raises(jsonschema.ValidationError):
        util.validate_config(util.prepare_config(launcher))


def workers(launcher):
    types = dict(launcher["available_node_types"])
    types.pop(launcher["head_node_type"])
    return list(types.values())


def test_launcher_workers_are_gpu_machines_on_spot_from_zero(launcher):
    assert workers(launcher)
    for worker in workers(launcher):
        assert worker["min_workers"] == 0 < worker["max_workers"] <= launcher["max_workers"]
        assert worker["resources"]["GPU"] >= 1
        node = worker["node_config"]
        if launcher["provider"]["type"] == "aws":
            assert node["InstanceMarketOptions"]["MarketType"] == "spot"
            assert re.match(r"(g|p)\d", node["InstanceType"])
        else:
            assert node["scheduling"]["provisioningModel"] == "SPOT"
            assert node["scheduling"]["onHostMaintenance"] == "TERMINATE"
            assert node["machineType"].startswith(("g2-", "a2-", "a3-"))


def test_launcher_head_takes_no_work_and_is_not_spot(launcher):
    head = launcher["available_node_types"][launcher["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "scheduling" not in head["node_config"]
    assert "guestAccelerators" not in head["node_config"]
    start = launcher["head_start_ray_commands"][-1]
    assert "--num-cpus=0" in start and "--num-gpus=0" in start


def test_launcher_stops_paying(launcher):
    assert 0 < launcher["idle_timeout_minutes"] <= IDLE_MINUTES
    assert launcher["provider"]["cache_stopped_nodes"] is False


def test_launcher_is_locked(launcher):
    assert any("RAY_AUTH_MODE=token" in option for option in launcher["docker"]["run_options"])
    assert launcher["file_mounts"]["~/stp/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][-1]
    for name, machine in launcher["available_node_types"].items():
        node = machine["node_config"]
        if launcher["provider"]["type"] == "aws":
            assert set(node["IamInstanceProfile"]) == {"Name"}
            assert node["MetadataOptions"]["HttpTokens"] == "required"
        elif name != launcher["head_node_type"]:
            assert node["serviceAccounts"][0]["email"].startswith("stp-ray-worker@")


# -- KubeRay


@pytest.mark.parametrize(("name", "kind"), KUBERAY.items())
def test_kuberay_files_keep_the_schema(name, kind):
    document = read("kuberay", name)
    check(document)
    assert document["kind"] == kind


@pytest.mark.parametrize("name", KUBERAY)
@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"minReplica": 0}, lambda spec: spec["workerGroupSpecs"][0]),
        ({"minReplicas": 1}, lambda spec: spec["workerGroupSpecs"][0]),
        ({"idleTimeout": 60}, lambda spec: spec["autoscalerOptions"]),
        ({"autoscaling": True}, lambda spec: spec),
        ({"mode": "disabled"}, lambda spec: spec["authOptions"]),
        ({"num-cpus": 4}, lambda spec: spec["headGroupSpec"]["rayStartParams"]),
        ({"hostNetwork": True}, lambda spec: spec["headGroupSpec"]["template"]["spec"]),
    ],
)
def test_the_schema_catches_mistakes(name, change, where):
    document = read("kuberay", name)
    spec = document["spec"]
    where(spec.get("rayClusterSpec", spec)).update(change)
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def node_terms(pod):
    affinity = pod["affinity"]["nodeAffinity"]
    terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    return [
        {e["key"]: (e["operator"], e.get("values")) for e in term["matchExpressions"]}
        for term in terms
    ]


def gpus(pod):
    return sum(
        int(container["resources"][kind].get("nvidia.com/gpu", 0))
        for container in pod["containers"]
        for kind in ("requests", "limits")
    )


def test_kuberay_workers_are_gpu_pods_on_spot_from_zero(cluster):
    assert cluster["enableInTreeAutoscaling"] is True
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        pod = group["template"]["spec"]
        assert gpus(pod) == 2  # one, requested and limited
        # Every term is enough for the scheduler, so every term must demand spot.
        terms = node_terms(pod)
        assert [set(term) for term in terms] == [{label} for label in SPOT_LABELS]
        for term in terms:
            for label, (operator, values) in term.items():
                assert (operator, values) == ("In", [SPOT_LABELS[label]])


def test_kuberay_head_takes_no_work_and_is_not_spot(cluster):
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    pod = head["template"]["spec"]
    assert gpus(pod) == 0
    (term,) = node_terms(pod)
    assert set(term) == set(SPOT_LABELS)
    for label, (operator, values) in term.items():
        assert operator == "DoesNotExist" or (operator, values) == ("NotIn", [SPOT_LABELS[label]])


def test_kuberay_stops_paying(cluster):
    assert 0 < cluster["autoscalerOptions"]["idleTimeoutSeconds"] <= 60 * IDLE_MINUTES
    job = read("kuberay", "rayjob.yaml")["spec"]
    assert job["shutdownAfterJobFinishes"] is True
    assert job["ttlSecondsAfterFinished"] <= 600


def test_kuberay_is_locked(cluster):
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["serviceAccountName"] == "stp-ray"


def test_dashboard_of_a_standing_cluster_is_on_loopback():
    start = ray_cluster("raycluster.yaml")["headGroupSpec"]["rayStartParams"]
    assert start["dashboard-host"] == "127.0.0.1"


def test_both_manifests_describe_the_same_cluster():
    one, other = ray_cluster("raycluster.yaml"), ray_cluster("rayjob.yaml")
    for spec in (one, other):  # what differs on purpose: how the job reaches the dashboard
        spec["headGroupSpec"]["rayStartParams"].pop("dashboard-host")
        spec["headGroupSpec"]["template"]["spec"]["containers"][0].pop("ports")
    assert one == other


# -- all of them


@pytest.mark.parametrize("path", all_files(), ids=lambda path: path.name)
def test_no_secret_is_written_down(path):
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{12}|-----BEGIN|\bghp_|\bxox[bp]-|ya29\.|AIza", text)
    assert not re.search(
        r"(?im)^[^#\n]*(access_?key|secret|password|api_?key|auth_token|credential)\w*[\"']?\s*[:=]\s*"
        r"(?!.*~/\.ray/auth_token)\S",
        text,
    )


def pins():
    lines = (CLUSTER / "requirements.txt").read_text().splitlines()
    found = [re.match(r"([A-Za-z0-9_-]+)(?:\[[\w,]+\])?==([\w.]+)$", line) for line in lines]
    return {m[1].lower(): m[2] for m in found if m}


def test_every_requirement_of_the_package_is_pinned():
    lines = (CLUSTER / "requirements.txt").read_text().splitlines()
    assert len(pins()) == sum(bool(line) and not line.startswith("#") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + extras["s3"] + extras["gcs"] + extras["export"]
    for requirement in needed:
        name, least = re.match(r"([\w.-]+?)(?:\[[^]]*\])?>=([\d.]+)", requirement).groups()
        pinned = [int(part) for part in pins()[name.lower()].split(".")]
        assert pinned >= [int(part) for part in least.split(".")], requirement


def test_every_node_runs_the_same_ray():
    version = pins()["ray"]
    assert f"FROM rayproject/ray:{version}-py311" in (CLUSTER / "Dockerfile").read_text()
    for name in LAUNCHER:
        docker = read(name)["docker"]
        for key in ("head_image", "worker_image"):
            assert docker[key].startswith(f"rayproject/ray:{version}-py311")
    for name in KUBERAY:
        spec = ray_cluster(name)
        assert spec["rayVersion"] == version
        groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"])
        images = {g["template"]["spec"]["containers"][0]["image"] for g in groups}
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert images == {f"REGISTRY/stp-ray:{project['version']}"}
