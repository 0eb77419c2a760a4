"""launch/gke.py's manifests: what is in them, and whether JobSet's and Kubernetes' schemas have it.

The schemas are the classes that Kubeflow generates from JobSet's API and from that of Kubernetes: names, nesting, types and
required fields are checked, the values of enumerations are not, and no cluster has seen these manifests.
"""

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from launch import gke

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["python", "-m", "peftjax.train", "--config=my_config.py", "--workdir=/mnt/runs/mine"]


def render(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    gke.main(["--name=mine", "--image=registry/peftjax:1", "--queue=research", *options, "--", *TRAIN])
    return yaml.safe_load(capsys.readouterr().out)


def fits_schema(manifest: dict[str, Any]) -> bool:
    """What the schema does not know is lost on the way through it; a wrong type is an error."""
    read = JobsetV1alpha2JobSet.from_dict(manifest)
    assert read is not None
    return read.to_dict() == manifest


def job_of(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The job's specification, and its pods'."""
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job, job["template"]["spec"]


def test_two_tpu_slices_are_two_jobs_of_a_pod_for_each_machine(capsys: pytest.CaptureFixture[str]) -> None:
    manifest = render(
        capsys, "--device=v5e:4x4", "--count=2", "--bucket=our-runs", "--spot", "--service-account=trainer"
    )
    job, pod = job_of(manifest)
    assert fits_schema(manifest)
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["serviceAccountName"] == "trainer"
    (main,) = pod["containers"]
    assert main["command"] == TRAIN  # GKE tells the processes of each other
    assert main["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "our-runs"


def test_gpu_machines_are_pods_of_one_job_that_are_told_where_the_first_is(capsys: pytest.CaptureFixture[str]) -> None:
    manifest = render(capsys, "--device=h100:8", "--count=3", "--claim=our-disk")
    job, pod = job_of(manifest)
    assert fits_schema(manifest)
    assert (manifest["spec"]["replicatedJobs"][0]["replicas"], job["parallelism"]) == (1, 3)
    (main,) = pod["containers"]
    # worker is the job's name in the set; the service has that of the set
    flags = ["--coordinator=mine-worker-0-0.mine:8476", "--num_processes=3", "--process_id=$(PROCESS_ID)"]
    assert main["command"] == [*TRAIN, *flags]
    assert "PROCESS_ID" in [variable["name"] for variable in main["env"]]
    assert main["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["volumes"][0] == {"name": "runs", "persistentVolumeClaim": {"claimName": "our-disk"}}


def test_what_was_stopped_begins_again_uncounted_and_what_failed_three_times(
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = render(capsys, "--device=l4:1", "--claim=our-disk")
    job, pod = job_of(manifest)
    stopped, disrupted = job["podFailurePolicy"]["rules"]
    assert (stopped["action"], stopped["onExitCodes"]["values"]) == ("FailJob", [75])
    assert (disrupted["action"], disrupted["onPodConditions"][0]["type"]) == ("FailJob", "DisruptionTarget")
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])


def test_each_part_of_a_sweep_is_a_run_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--name=mine", "--image=i", "--queue=q", "--device=h100:8", "--claim=our-disk", "--parts=3"]
    gke.main([*options, "--", "python", "-m", "peftjax.sweep", "--sweep.seed=0,1,2"])
    manifests = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [manifest["metadata"]["name"] for manifest in manifests] == ["mine-1", "mine-2", "mine-3"]
    for index, manifest in enumerate(manifests, 1):
        assert fits_schema(manifest)
        (main,) = job_of(manifest)[1]["containers"]
        assert main["command"][3:6] == [
            "--sweep.seed=0,1,2", f"--part={index}/3", f"--coordinator=mine-{index}-worker-0-0.mine-{index}:8476",
        ]  # fmt: skip


def test_the_schema_would_notice(capsys: pytest.CaptureFixture[str]) -> None:
    manifest = render(capsys, "--device=v5p:2x2x2", "--claim=our-disk")
    misspelt, wrong = copy.deepcopy(manifest), copy.deepcopy(manifest)
    job_of(misspelt)[1]["containers"][0]["volumeMount"] = []
    job_of(wrong)[0]["parallelism"] = "2"
    assert not fits_schema(misspelt)
    with pytest.raises(ValueError, match="parallelism"):
        fits_schema(wrong)


@pytest.mark.parametrize(
    ("device", "pods", "chips"), [("v5e:1x1", 1, 1), ("v6e:2x2", 1, 4), ("v6e:2x4", 2, 4), ("v5p:2x2x4", 4, 4)]
)
def test_a_machine_has_four_chips(capsys: pytest.CaptureFixture[str], device: str, pods: int, chips: int) -> None:
    job, pod = job_of(render(capsys, f"--device={device}", "--claim=our-disk"))
    assert (job["parallelism"], pod["containers"][0]["resources"]["limits"]["google.com/tpu"]) == (pods, chips)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device=v5e"], "--device=v5e: give the topology, as in v5e:4x4"),
        (["--device=v5p:4x4"], "give the topology, as in v5p:2x2x2"),
        (["--device=v5e:2x3"], "6 chips are not a multiple of 4 chips per machine"),
        (["--device=h100"], "give the number of GPUs per machine, as in h100:8"),
        (["--device=tpu:4"], "unknown device 'tpu'; choose from v4, v5e, v5p, v6e, l4"),
        (["--device=l4:1", "--count=0"], "--count=0: must be at least 1"),
        (["--device=l4:1", "--parts=0"], "--parts=0: must be at least 1"),
        (["--device=l4:1", "--name=My_Run"], "--name=My_Run: use at most 40 lowercase letters"),
        (["--device=l4:1", "--bucket=ours"], "give either --bucket or --claim"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        render(capsys, "--claim=our-disk", *options)
    assert message in capsys.readouterr().err


def test_the_images_install_extras_that_exist() -> None:
    extras = re.findall(r"\.\[(\w+)\]", (ROOT / "launch" / "Dockerfile").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras == ["tpu", "cuda"]
    assert set(extras) <= set(project["optional-dependencies"])
