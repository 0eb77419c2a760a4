"""Write the Kubernetes manifest of a run: a JobSet for TPU slices or GPU machines of GKE, queued by Kueue.

    python launch/gke.py --name=mine --image=IMAGE --device=v5e:4x4 --queue=research --bucket=my-runs -- \\
        python -m peftjax.train --config=my_config.py --workdir=/mnt/runs/mine > mine.yaml
    kubectl apply -f mine.yaml

docs/launch_gke.md is the guide: cluster, queue, image, bucket.
"""

import argparse
import math
import re
import sys
from typing import Any

import yaml

STOPPED = 75  # a command's exit code for: stopped by SIGTERM, all saved, run me again
MOUNT = "/mnt/runs"
PORT = 8476  # of process 0, inside the pods' own network

# What --device calls it: what GKE's nodes call it; and a topology, of two or three sides.
TPUS = {
    "v4": ("tpu-v4-podslice", "2x2x2"),
    "v5e": ("tpu-v5-lite-podslice", "4x4"),
    "v5p": ("tpu-v5p-slice", "2x2x2"),
    "v6e": ("tpu-v6e-slice", "4x4"),
}
GPUS = {
    "l4": "nvidia-l4",
    "a100-40gb": "nvidia-tesla-a100",
    "a100-80gb": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
}

Json = dict[str, Any]


def main(argv: list[str]) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        manifest = jobset(options)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(yaml.safe_dump(manifest, sort_keys=False))


def make_parser() -> argparse.ArgumentParser:
    """The options; all that comes after `--` is the command."""
    parser = argparse.ArgumentParser(
        prog="python launch/gke.py",
        usage="%(prog)s --name=NAME --image=IMAGE --device=DEVICE --queue=QUEUE [options] -- COMMAND ...",
        description="Write the manifest of a run on GKE to stdout, for kubectl apply -f.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", required=True, help="of the run")
    add("--image", required=True, help="made from launch/Dockerfile")
    add(
        "--device",
        required=True,
        help="a TPU with its topology (v5e:4x4) or a GPU with how many a machine has (h100:8)",
    )
    add("--count", type=int, default=1, help="how many slices of a TPU, or machines of a GPU (default: 1)")
    add("--queue", required=True, help="Kueue's LocalQueue")
    add("--bucket", help=f"a bucket to mount at {MOUNT}, where the workdir should be")
    add("--claim", help=f"a PersistentVolumeClaim to mount at {MOUNT} instead of a bucket")
    add("--service-account", help="of Kubernetes, which may write to the bucket")
    add("--spot", action="store_true", help="on machines that are cheaper and may be taken away")
    add("--max-restarts", type=int, default=3, help="after failures; preemptions are not counted (default: 3)")
    add("command", nargs="+", metavar="COMMAND", help="what each process runs, as: -- python -m peftjax.train ...")
    return parser


def jobset(options: argparse.Namespace) -> Json:
    """The manifest. A slice, or all machines together, is one job, a machine one pod, and a pod one process.

    A job ends with its first pod that does not end well. One that was stopped with all saved, or taken away, begins again
    as often as that happens; one that failed, `max_restarts` times.
    """
    if len(options.name) > 40 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", options.name):
        raise ValueError(
            f"--name={options.name}: at most 40 small letters, digits and -, a letter first, no - at the end"
        )
    if options.count < 1:
        raise ValueError(f"--count={options.count}: at least 1 is needed")
    if (options.bucket is None) == (options.claim is None):
        raise ValueError("give --bucket or --claim, one of them: what a run writes must outlive its pods")
    kind, _, size = options.device.partition(":")
    if kind in TPUS:
        jobs, pods, pod = options.count, *tpu_pod(options, kind, size)
    elif kind in GPUS:
        jobs, pods, pod = 1, options.count, gpu_pod(options, kind, size)
    else:
        raise ValueError(f"--device={options.device}: {kind!r} is none of {', '.join([*TPUS, *GPUS])}")
    if options.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    # Each slice has a node pool of its own, and all pods of a slice must be in the same.
    alone = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if kind in TPUS else {}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "labels": {"kueue.x-k8s.io/queue-name": options.queue},
            "annotations": alone,
        },
        "spec": {
            # a headless service of the run's name: pod I of job J is NAME-worker-J-I.NAME, before it is ready too
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "restartStrategy": "BlockingRecreate",  # the new pods wait until the old ones have let go of the workdir
                "rules": [
                    {
                        "name": "stopped",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "worker", "replicas": jobs, "template": {"spec": job(pods, pod, options)}}],
        },
    }


def job(pods: int, pod: Json, options: argparse.Namespace) -> Json:
    """`pods` pods that are numbered. Its reason to fail is PodFailurePolicy where a pod was stopped or taken away."""
    annotations = {"gke-gcsfuse/volumes": "true"} if options.bucket else {}
    return {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "main", "operator": "In", "values": [STOPPED]},
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"metadata": {"annotations": annotations}, "spec": pod},
    }


def tpu_pod(options: argparse.Namespace, kind: str, topology: str) -> tuple[int, Json]:
    """How many pods a slice has, and the pod. Its processes find each other by what GKE tells them."""
    label, example = TPUS[kind]
    sides = topology.split("x")
    if len(sides) != len(example.split("x")) or not all(re.fullmatch(r"[1-9]\d*", side) for side in sides):
        raise ValueError(f"--device={options.device}: say the topology, as in {kind}:{example}")
    chips = math.prod(int(side) for side in sides)
    each = min(chips, 4)  # a machine has 4 chips, or the only one
    if chips % each:
        raise ValueError(f"--device={options.device}: {chips} chips do not make whole machines of {each}")
    labels = {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": topology}
    return chips // each, make_pod(options, options.command, labels, {"google.com/tpu": each})


def gpu_pod(options: argparse.Namespace, kind: str, number: str) -> Json:
    """The pod: one process that drives all GPUs of its machine, and is told where the first process is."""
    if not re.fullmatch(r"[1-9]\d*", number):
        raise ValueError(f"--device={options.device}: say how many a machine has, as in {kind}:8")
    flags = [
        f"--coordinator={options.name}-worker-0-0.{options.name}:{PORT}",
        f"--num_processes={options.count}",
        "--process_id=$(PROCESS_ID)",  # put in by Kubernetes
    ]
    pod = make_pod(
        options,
        [*options.command, *flags],
        {"cloud.google.com/gke-accelerator": GPUS[kind]},
        {"nvidia.com/gpu": int(number)},
    )
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    main = pod["containers"][0]
    main["env"].append({"name": "PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}})
    # GPUs of one machine talk through shared memory, of which a container has 64 MiB
    main["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})
    pod["volumes"].append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    return pod


def make_pod(options: argparse.Namespace, command: list[str], labels: Json, resources: Json) -> Json:
    """A pod of one container on a node of these labels, with the run's volume."""
    if options.bucket:
        attributes = {"bucketName": options.bucket, "mountOptions": "implicit-dirs"}
        volume: Json = {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
    else:
        volume = {"persistentVolumeClaim": {"claimName": options.claim}}
    return {
        "restartPolicy": "Never",  # a process alone cannot come back to the others
        "terminationGracePeriodSeconds": 120,  # from SIGTERM on; a spot machine has less
        "nodeSelector": labels,
        "containers": [
            {
                "name": "main",
                "image": options.image,
                "command": command,
                "env": [{"name": "JAX_COMPILATION_CACHE_DIR", "value": f"{MOUNT}/.cache/jax"}],
                "resources": {"limits": resources},
                "volumeMounts": [{"name": "runs", "mountPath": MOUNT}],
            }
        ],
        "volumes": [{"name": "runs", **volume}],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
