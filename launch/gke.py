"""Write the Kubernetes manifest of a run: a JobSet on TPU slices or GPU machines of GKE, queued by Kueue.

    python launch/gke.py --name=mine --image=IMAGE --device=v5e:4x4 --queue=research --bucket=my-runs -- \\
        python -m peftjax.train --config=my_config.py --workdir=/mnt/runs/mine > mine.yaml
    kubectl apply -f mine.yaml

See docs/launch_gke.md for the cluster, queue, image and bucket. The script does not import peftjax, so that it runs where
only PyYAML is installed.
"""

import argparse
import math
import re
import sys
from typing import Any

import yaml

STOPPED = 75  # exit code of a command that was stopped by SIGTERM, saved its state and should run again
MOUNT = "/mnt/runs"
PORT = 8476  # port of process 0 in the pod network

# {name in --device: (GKE node label, example topology)}
TPUS = {
    "v4": ("tpu-v4-podslice", "2x2x2"),
    "v5e": ("tpu-v5-lite-podslice", "4x4"),
    "v5p": ("tpu-v5p-slice", "2x2x2"),
    "v6e": ("tpu-v6e-slice", "4x4"),
}
# {name in --device: GKE node label}
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
        manifests = [jobset(one) for one in parts(options)]
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(yaml.safe_dump_all(manifests, sort_keys=False))


def make_parser() -> argparse.ArgumentParser:
    """Make the parser; everything after `--` is the command."""
    parser = argparse.ArgumentParser(
        prog="python launch/gke.py",
        usage="%(prog)s --name=NAME --image=IMAGE --device=DEVICE --queue=QUEUE [options] -- COMMAND ...",
        description="Write the manifest of a GKE run to stdout, for kubectl apply -f.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", required=True, help="Name of the run")
    add("--image", required=True, help="Container image built from launch/Dockerfile")
    add(
        "--device",
        required=True,
        help="TPU type and topology (v5e:4x4), or GPU type and number per machine (h100:8)",
    )
    add("--count", type=int, default=1, help="Number of TPU slices or GPU machines (default: 1)")
    add("--parts", type=int, default=1, help="Number of runs that train a sweep, each one part of it (default: 1)")
    add("--queue", required=True, help="LocalQueue of Kueue")
    add("--bucket", help=f"Bucket to mount at {MOUNT}, for the workdir")
    add("--claim", help=f"PersistentVolumeClaim to mount at {MOUNT} instead of a bucket")
    add("--service-account", help="Kubernetes service account with write access to the bucket")
    add("--spot", action="store_true", help="Use spot machines, which are cheaper but may be preempted")
    add(
        "--max-restarts",
        type=int,
        default=3,
        help="Maximum restarts after failures, not counting preemptions (default: 3)",
    )
    add("command", nargs="+", metavar="COMMAND", help="Command of each process, as in: -- python -m peftjax.train ...")
    return parser


def parts(options: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of each part of a sweep, NAME-1 to NAME-N, whose command ends with --part=I/N.

    Each part is a JobSet of its own, so that it starts, restarts and fails without the others.

    Raises:
        ValueError: The number of parts is not positive.
    """
    if options.parts < 1:
        raise ValueError(f"--parts={options.parts}: must be at least 1")
    if options.parts == 1:
        return [options]
    return [
        argparse.Namespace(
            **vars(options)
            | {"name": f"{options.name}-{index}", "command": [*options.command, f"--part={index}/{options.parts}"]}
        )
        for index in range(1, options.parts + 1)
    ]


def jobset(options: argparse.Namespace) -> Json:
    """Make the manifest of a run.

    Each TPU slice is one job; GPU machines together are one job. A machine is one pod with one process. A job ends when
    one of its pods fails. Preempted runs, and runs that were stopped after saving their state, restart without limit;
    failed runs restart up to `max_restarts` times.

    Raises:
        ValueError: An option is invalid.
    """
    if len(options.name) > 40 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", options.name):
        raise ValueError(
            f"--name={options.name}: use at most 40 lowercase letters, digits and hyphens, starting with a letter and not "
            "ending with a hyphen"
        )
    if options.count < 1:
        raise ValueError(f"--count={options.count}: must be at least 1")
    if (options.bucket is None) == (options.claim is None):
        raise ValueError("give either --bucket or --claim: the output of a run must outlive its pods")
    kind, _, size = options.device.partition(":")
    if kind in TPUS:
        jobs, pods, pod = options.count, *tpu_pod(options, kind, size)
    elif kind in GPUS:
        jobs, pods, pod = 1, options.count, gpu_pod(options, kind, size)
    else:
        raise ValueError(f"--device={options.device}: unknown device {kind!r}; choose from {', '.join([*TPUS, *GPUS])}")
    if options.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    # Each slice is a separate node pool, and all pods of a job must be placed in the same slice.
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
            # A headless service named after the run: pod I of job J is NAME-worker-J-I.NAME, even before it is ready.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "restartStrategy": "BlockingRecreate",  # new pods start after the old ones have released the workdir
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
    """Make the specification of an indexed job of equal pods.

    The job fails with the reason PodFailurePolicy if a pod was preempted, or was stopped after saving its state.
    """
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
    """Return the number of pods of a TPU slice, and their specification. GKE provides the addresses of the processes.

    Args:
        options: Parsed command line.
        kind: TPU type, a key of `TPUS`.
        topology: Topology of the slice, such as 4x4.

    Raises:
        ValueError: The topology is invalid.
    """
    label, example = TPUS[kind]
    sides = topology.split("x")
    if len(sides) != len(example.split("x")) or not all(re.fullmatch(r"[1-9]\d*", side) for side in sides):
        raise ValueError(f"--device={options.device}: give the topology, as in {kind}:{example}")
    chips = math.prod(int(side) for side in sides)
    each = min(chips, 4)  # machines have 4 chips; a slice of fewer is one machine
    if chips % each:
        raise ValueError(f"--device={options.device}: {chips} chips are not a multiple of {each} chips per machine")
    labels = {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": topology}
    return chips // each, make_pod(options, options.command, labels, {"google.com/tpu": each})


def gpu_pod(options: argparse.Namespace, kind: str, number: str) -> Json:
    """Make the pod of a GPU machine: one process that drives all GPUs and receives the address of process 0.

    Args:
        options: Parsed command line.
        kind: GPU type, a key of `GPUS`.
        number: Number of GPUs per machine.

    Raises:
        ValueError: The number is not a positive integer.
    """
    if not re.fullmatch(r"[1-9]\d*", number):
        raise ValueError(f"--device={options.device}: give the number of GPUs per machine, as in {kind}:8")
    flags = [
        f"--coordinator={options.name}-worker-0-0.{options.name}:{PORT}",
        f"--num_processes={options.count}",
        "--process_id=$(PROCESS_ID)",  # expanded by Kubernetes
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
    # GPUs of one machine communicate through shared memory, which is limited to 64 MiB in a container.
    main["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})
    pod["volumes"].append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    return pod


def make_pod(options: argparse.Namespace, command: list[str], labels: Json, resources: Json) -> Json:
    """Make a pod with one container and the volume of the run, for a node with these labels."""
    if options.bucket:
        attributes = {"bucketName": options.bucket, "mountOptions": "implicit-dirs"}
        volume: Json = {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
    else:
        volume = {"persistentVolumeClaim": {"claimName": options.claim}}
    return {
        "restartPolicy": "Never",  # a single process cannot rejoin the others
        "terminationGracePeriodSeconds": 120,  # after SIGTERM; spot machines have less time
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
