"""The cluster files, checked without a cloud: Ray's own validators, and schemas of ours."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from stp_ray import preemption

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
CLOUDS = ["aws.yaml", "gcp.yaml", "azure.yaml"]
LAUNCHER = [*CLOUDS, "onprem.yaml"]
KUBERAY = {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob"}
SPOT_LABELS = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
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


@pytest.fixture(params=CLOUDS)
def cloud(request):
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


def test_the_autoscaler_finds_an_image_for_every_machine(launcher):
    # Ray's second autoscaler needs the key `image` where an image is given per kind of machine.
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = pytest.importorskip("ray.autoscaler.v2.instance_manager.config")
    prepared = config.AutoscalingConfig(util.prepare_config(launcher), skip_content_hash=True)
    version = pins()["ray"]
    for name, machine in prepared.get_config("available_node_types").items():
        docker = prepared.get_docker_config(name)
        has_gpu = machine["resources"].get("GPU", 0) > 0 or launcher["provider"]["type"] == "local"
        assert docker["image"] == f"rayproject/ray:{version}-py311" + ("-gpu" if has_gpu else "")
        assert ("--gpus all" in docker.get("worker_run_options", [])) == has_gpu


def is_spot(provider, node):
    return {
        "aws": lambda: node.get("InstanceMarketOptions") == {"MarketType": "spot"},
        "gcp": lambda: node.get("scheduling", {}).get("provisioningModel") == "SPOT",
        "azure": lambda: node["azure_arm_parameters"].get("priority") == "Spot",
    }[provider]()


def test_cloud_workers_are_on_spot_from_zero(cloud):
    types = dict(cloud["available_node_types"])
    head = types.pop(cloud["head_node_type"])
    provider = cloud["provider"]["type"]
    assert not is_spot(provider, head["node_config"])
    assert {name: bool(each["resources"]["GPU"]) for name, each in types.items()} == {
        "gpu_worker": True,
        "cpu_worker": False,
    }
    for worker in types.values():
        assert worker["min_workers"] == 0 < worker["max_workers"] <= cloud["max_workers"]
        node = worker["node_config"]
        assert is_spot(provider, node)
        if provider == "gcp":
            assert node["scheduling"]["onHostMaintenance"] == "TERMINATE"
            assert node["scheduling"]["instanceTerminationAction"] == "DELETE"
        if provider == "azure":
            assert node["azure_arm_parameters"]["evictionPolicy"] == "Delete"


def test_cloud_gpu_workers_are_machines_with_a_gpu(cloud):
    node = cloud["available_node_types"]["gpu_worker"]["node_config"]
    pattern, kind = {
        "aws": (r"(g|p)\d", node.get("InstanceType")),
        "gcp": (r"(g2|a2|a3)-", node.get("machineType")),
        "azure": (r"Standard_N[CD]", node.get("azure_arm_parameters", {}).get("vmSize")),
    }[cloud["provider"]["type"]]
    assert re.match(pattern, kind)


def test_launcher_head_takes_no_work(launcher):
    types = launcher.get("available_node_types")
    if types:
        assert types[launcher["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    start = launcher["head_start_ray_commands"][-1]
    assert "--num-cpus=0" in start and "--num-gpus=0" in start


def test_launcher_stops_paying(cloud):
    assert 0 < cloud["idle_timeout_minutes"] <= IDLE_MINUTES
    assert cloud["provider"]["cache_stopped_nodes"] is False


def test_machines_of_ones_own_are_all_started(tmp_path):
    # The autoscaler starts from zero only what it knows to have the resources asked for.
    config = read("onprem.yaml")
    config["provider"]["worker_ips"] = [f"192.0.2.{place}" for place in range(11, 16)]
    util = pytest.importorskip("ray.autoscaler._private.util")
    prepared = util.prepare_config(copy.deepcopy(config))
    (machine,) = prepared["available_node_types"].values()
    assert machine["min_workers"] == machine["max_workers"] == prepared["max_workers"] == 5
    # Its second version, which `ray up` turns on, takes the head for one of them.
    assert "RAY_enable_autoscaler_v2=0" in start_head(
        config, tmp_path, RAY_enable_autoscaler_v2="1", RAY_NODE_TYPE_NAME="local.cluster.node"
    )


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_machine_of_google_gets_what_its_image_lacks(tmp_path, gpu, there):
    """The commands themselves, on a machine of stand-ins that write down how they were called."""
    stand_ins = {
        "sudo": 'echo "$@" >> "$0.calls"',
        "curl": "echo deb https://source /",
        "sleep": ":",
    }
    stand_ins["lspci"] = f"echo {'NVIDIA L4' if gpu else 'a disk'}"
    stand_ins["nvidia-smi"] = f"exit {0 if gpu else 1}"
    if there:
        stand_ins |= {"docker": ":", "nvidia-ctk": ":"}
    for name in ("bash", "grep", "sed", "timeout"):
        (tmp_path / name).symlink_to(shutil.which(name))
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for command in read("gcp.yaml")["initialization_commands"]:
        subprocess.run(
            ["bash", "-c", command], env={"PATH": str(tmp_path), "USER": "ubuntu"}, timeout=60,
            check=True,
        )  # fmt: skip
    calls = (tmp_path / "sudo.calls").read_text()
    assert ("install docker.io" in calls) == (not there)
    for word in (
        "install nvidia-container-toolkit",
        "nvidia-ctk runtime configure",
        "restart docker",
    ):
        assert (word in calls) == (gpu and not there)
    assert calls.splitlines()[-1] == "usermod -aG docker ubuntu"


def test_launcher_is_locked(launcher):
    assert any("RAY_AUTH_MODE=token" in option for option in launcher["docker"]["run_options"])
    assert launcher["file_mounts"]["~/stp/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][-1]


def test_cloud_rights_come_from_roles():
    for machine in read("aws.yaml")["available_node_types"].values():
        assert set(machine["node_config"]["IamInstanceProfile"]) == {"Name"}
        assert machine["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    types = read("gcp.yaml")["available_node_types"]
    for name in ("gpu_worker", "cpu_worker"):
        (account,) = types[name]["node_config"]["serviceAccounts"]
        assert account["email"].startswith("stp-ray-worker@")
    azure = read("azure.yaml")
    assert azure["provider"]["msi_name"]
    assert "AZURE_STORAGE_ANON=false" in " ".join(azure["docker"]["run_options"])


def start_head(launcher, folder, **variables):
    """What `ray start --head` would be given: its arguments, then its environment, from the
    launcher's own command with a `ray` that only looks."""
    folder.joinpath("ray").write_text('#!/bin/sh\necho "$@"; env\n')
    folder.joinpath("ray").chmod(0o755)
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {**os.environ, "WANDB_API_KEY": "", **variables, "PATH": path, "HOME": str(folder)}
    given = {name: value for name, value in given.items() if value}
    command = launcher["head_start_ray_commands"][-1]
    done = subprocess.run(
        ["bash", "-c", command], env=given, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", CLOUDS)
def test_a_secret_that_is_not_there_does_not_keep_the_head_down(name, tmp_path):
    # Nothing of a cloud answers here: on port 9 of the loopback nobody listens.
    nowhere = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_MAX_ATTEMPTS": "1",
        "GCE_METADATA_HOST": "127.0.0.1:9",
        "GCE_METADATA_IP": "127.0.0.1:9",
        "NO_GCE_CHECK": "true",
        "IDENTITY_ENDPOINT": "http://127.0.0.1:9",
        "IDENTITY_HEADER": "none",
    }
    seen = start_head(read(name), tmp_path, **nowhere)
    assert seen[0].startswith("start --head --port=6379")
    assert not any(line.startswith("WANDB_API_KEY") for line in seen)


def test_a_secret_reaches_the_head_by_its_role(s3, tmp_path):
    boto3 = pytest.importorskip("boto3")
    client = boto3.client("ssm", region_name="us-west-2")
    key = "planted-0123456789"
    client.put_parameter(Name="/stp-ray/wandb", Value=key, Type="SecureString")
    seen = start_head(read("aws.yaml"), tmp_path)
    assert f"WANDB_API_KEY={key}" in seen
    assert key not in seen[0]  # the command line, which every user of the machine sees
    assert key not in CLUSTER.joinpath("aws.yaml").read_text()


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_watch_for_the_notice_of_their_cloud(name, tmp_path):
    launcher = read(name)
    mounted = launcher["file_mounts"]["~/stp/preemption.py"]
    assert (ROOT / mounted).samefile(preemption.__file__)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"; exec sleep 2\n')
    python.chmod(0o755)
    given = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    # As Ray does; it has to come back while the watcher goes on.
    command = f"({launcher['worker_start_ray_commands'][-1]})"
    subprocess.run(["bash", "-c", command], env=given, timeout=1.5, check=True)
    log = tmp_path / "preemption.log"
    deadline = time.monotonic() + 10
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    cloud = Path(name).stem
    assert log.read_text().split() == [f"{tmp_path}/stp/preemption.py", cloud]
    assert cloud in preemption.NOTICES


def test_pods_that_are_ended_drain_first(cluster):
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "-m", "stp_ray.preemption", "now"]
        assert preemption.NOTICES["now"]("") <= pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", CLOUDS)
def test_the_code_that_asks_for_a_secret_can_be_read(name):
    (code,) = re.findall(r"python -c '([^']+)'", read(name)["head_start_ray_commands"][-1])
    compile(code, name, "exec")


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
        (
            {"value": "a key"},
            lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"][0],
        ),
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


def test_kuberay_workers_are_on_spot_from_zero(cluster):
    assert cluster["enableInTreeAutoscaling"] is True
    # One GPU, requested and limited.
    found = {g["groupName"]: gpus(g["template"]["spec"]) for g in cluster["workerGroupSpecs"]}
    assert found == {"gpu": 2, "cpu": 0}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        # Every term is enough for the scheduler, so every term must demand spot.
        terms = node_terms(group["template"]["spec"])
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


def test_kuberay_pods_have_the_shared_memory_that_ray_takes(cluster):
    """Of a pod's memory Ray takes 0.3 for objects, but no more than 0.95 of the shared memory or
    ten gigabytes, whichever is more; what that memory cannot hold goes to the disk."""
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (shared,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shared-memory"]
        shared = 2**30 * int(shared["sizeLimit"].removesuffix("Gi"))
        memory = pod["containers"][0]["resources"]["limits"]["memory"]
        wanted = 0.3 * 2**30 * int(memory.removesuffix("Gi"))
        assert min(wanted, max(1e10, 0.95 * shared)) <= shared


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


def test_kuberay_takes_the_key_of_wandb_from_a_secret(cluster):
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    (key,) = head["env"]
    assert key["name"] == "WANDB_API_KEY"
    assert key["valueFrom"]["secretKeyRef"]["optional"] is True  # most runs need none
    for group in cluster["workerGroupSpecs"]:
        assert "env" not in group["template"]["spec"]["containers"][0]


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
    text = text.replace('WANDB_API_KEY="$key"', "")  # from a cloud's store of secrets
    assert not re.search(
        r"(?im)^[^#\n]*(access_?key|secret(?!KeyRef)|password|api_?key|auth_token|credential)\w*"
        r"[\"']?\s*[:=]\s*(?!.*~/\.ray/auth_token)\S",
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
    needed = project["dependencies"] + extras["s3"] + extras["gcs"] + extras["azure"]
    needed += extras["export"]
    for requirement in needed:
        name, least = re.match(r"([\w.-]+?)(?:\[[^]]*\])?>=([\d.]+)", requirement).groups()
        pinned = [int(part) for part in pins()[name.lower()].split(".")]
        assert pinned >= [int(part) for part in least.split(".")], requirement


def test_every_node_runs_the_same_ray():
    version = pins()["ray"]
    assert f"FROM rayproject/ray:{version}-py311" in (CLUSTER / "Dockerfile").read_text()
    for name in LAUNCHER:
        images = re.findall(r"image: (\S+)", CLUSTER.joinpath(name).read_text())
        assert set(images) <= {f"rayproject/ray:{version}-py311{end}" for end in ("", "-gpu")}
        assert read(name)["file_mounts"]["~/stp/requirements.txt"] == "cluster/requirements.txt"
    for name in KUBERAY:
        spec = ray_cluster(name)
        assert spec["rayVersion"] == version
        groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"])
        images = {g["template"]["spec"]["containers"][0]["image"] for g in groups}
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert images == {f"REGISTRY/stp-ray:{project['version']}"}
