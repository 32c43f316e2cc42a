"""GKE: a JobSet manifest, and what to do with it. The cluster restarts the job; `babysit` does not manage it.

tpu7x is to be had here only. Its two chips on each side of a host are two containers, each with a process of its own.
"""

import json
import string
from pathlib import Path

from spiral_jax.errors import SpiralError
from tpu.hosts import environment
from tpu.job import Job

_TEMPLATE = Path(__file__).parent.parent / "templates" / "jobset.yaml"

# Of a node pool: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
_ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
# A selector of nodes, without which pods with these prices are not placed.
_PRICING = {
    "spot": {"cloud.google.com/gke-spot": "true"},
    "flex_start": {"cloud.google.com/gke-flex-start": "true"},
    "reserved": {},
    "on_demand": {},
}


def manifest(job: Job, image: str) -> str:
    """The JobSet, as YAML whose values are JSON.

    Args:
      job: with provider `gke`.
      image: a container image with the code and the lock's packages.

    Raises:
      SpiralError: no image was named.
    """
    if not image:
        raise SpiralError("--image is missing; allowed: a container image with this code, as in docker.io/me/spiral")
    tpu = job.slice
    per_host = tpu.chips // tpu.hosts
    containers = 2 if tpu.generation.name == "tpu7x" and per_host == 4 else 1
    selector = {
        "cloud.google.com/gke-tpu-accelerator": _ACCELERATORS[tpu.generation.name],
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, tpu.shape)),
        **_PRICING[job.pricing],
    }
    # No shell, so that SIGTERM reaches Python. What a supervisor is for elsewhere, the cluster does.
    command = ["python3", "-u", "-m", *job.arguments]
    env = [{"name": name, "value": value} for name, value in environment(job).items()]
    chips = {"google.com/tpu": per_host // containers}
    pods = [
        {
            "name": f"{job.name}-{i}" if containers > 1 else job.name,
            "image": image,
            "command": command,
            "env": env,
            "ports": [{"containerPort": 8471 + 10 * i}, {"containerPort": 8431 + 10 * i}],
            "securityContext": {"privileged": True},
            "resources": {"requests": chips, "limits": chips},
        }
        for i in range(containers)
    ]
    return string.Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=json.dumps(job.name),
        labels=json.dumps(job.labels),
        slices=job.num_slices,
        hosts=tpu.hosts,
        restarts=job.max_preemptions,
        selector=json.dumps(selector),
        again=json.dumps([42, 43, *range(127, 256)]),
        containers=json.dumps(pods),
    )


def commands(job: Job, file: str) -> list[list[str]]:
    """What to type, with the cluster's name in capitals."""
    project = [f"--project={job.project}"] if job.project else []
    label = f"jobset.sigs.k8s.io/jobset-name={job.name}"
    return [
        ["gcloud", "container", "clusters", "get-credentials", "CLUSTER", f"--location={job.region}", *project],
        ["kubectl", "apply", "--server-side", f"--filename={file}"],
        ["kubectl", "get", f"jobset/{job.name}"],
        ["kubectl", "logs", f"--selector={label}", "--follow", "--all-containers"],
        ["kubectl", "delete", f"jobset/{job.name}"],
        [
            "gcloud",
            "container",
            "node-pools",
            "delete",
            "POOL",
            "--cluster=CLUSTER",
            f"--location={job.region}",
            *project,
        ],
    ]
