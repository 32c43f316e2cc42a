"""Queued resources: a request that waits for chips. v4, v5e, v5p and v6e, one slice or several."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tpu.gcloud import Gcloud, GcloudError
from tpu.job import Job
from tpu.providers import LABEL, Observation, State, observe_node, unanswered, whole

_GROUP = ("compute", "tpus", "queued-resources")
_LONGEST = 7 * 86400  # seconds that a flex-start slice may live

# google.rpc.Code of a request that others' use of the chips has ended: RESOURCE_EXHAUSTED, ABORTED, INTERNAL,
# UNAVAILABLE.
_CAPACITY_CODES = (8, 10, 13, 14)


@dataclasses.dataclass(frozen=True)
class Queued:
    """See `Provider`."""

    job: Job
    gcloud: Gcloud

    def create_command(self, seconds: float) -> list[str]:
        job = self.job
        many = job.num_slices > 1
        command = [
            *(["alpha"] if job.pricing == "flex_start" else []),
            *_GROUP,
            "create",
            job.name,
            f"--zone={job.zone}",
            f"--accelerator-type={job.slice.accelerator_type}",
            f"--runtime-version={job.slice.generation.runtime}",
            *([f"--node-count={job.num_slices}", f"--node-prefix={job.name}"] if many else [f"--node-id={job.name}"]),
        ]
        if job.pricing == "flex_start":
            # Then the cloud itself ends what the launcher cannot, should it be dead by then.
            command += ["--provisioning-model=flex-start", f"--max-run-duration={int(min(seconds, _LONGEST))}s"]
        return [*command, *common_flags(job), "--async"]

    def delete_command(self) -> list[str]:
        return [*_GROUP, "delete", self.job.name, f"--zone={self.job.zone}", "--force", "--async"]

    def create(self, seconds: float) -> None:
        # Ended before the babysitter takes a "not found" for an answer (`LANDS`).
        self.gcloud.run(*self.create_command(seconds), timeout=90)

    def delete(self) -> None:
        delete(self.gcloud, self.delete_command(), f"queuedResources/{self.job.name}")

    def observe(self) -> Observation:
        job = self.job
        try:
            found = self.gcloud.json(
                *_GROUP, "describe", job.name, f"--zone={job.zone}", resource=f"queuedResources/{job.name}"
            )
        except GcloudError as error:
            return unanswered(error)
        status = found.get("state", {})
        word = status.get("state", "")
        labels = (found.get("tpu", {}).get("nodeSpec") or [{}])[0].get("node", {}).get("labels", {})
        ours = labels.get(LABEL) == job.name
        if word == "ACTIVE":
            nodes = whole(observe_node(self.gcloud, job, name) for name in self._nodes(found))
            return dataclasses.replace(nodes, words=f"ACTIVE, {nodes.words}", ours=ours)
        failed = status.get("failedData", {}).get("error", {})
        return Observation(
            _STATES.get(word, State.UNKNOWN),
            words=word or "without a state",
            by_user=status.get("stateInitiator") == "USER" and word in ("SUSPENDING", "SUSPENDED"),
            capacity=word != "FAILED" or failed.get("code") in _CAPACITY_CODES,
            message=failed.get("message", ""),
            billing=_BILLING.get(word, True),
            ours=ours,
        )

    def ssh(self, command: str, worker: str = "all", node: str = "all", output: str = "") -> list[str]:
        return ssh(_GROUP, self.job, self._at(worker, node), command, output)

    def scp(self, sources: Sequence[str], target: str, worker: str = "all", node: str = "all") -> list[str]:
        return scp(_GROUP, self.job, self._at(worker, node), sources, target)

    def _at(self, worker: str, node: str) -> list[str]:
        return [f"--node={node}", f"--worker={worker}"]

    def _nodes(self, found: dict[str, Any]) -> list[str]:
        """Names of the nodes. The service writes a `nodeSpec` for each; before, they follow from the prefix."""
        names = [spec["nodeId"] for spec in found.get("tpu", {}).get("nodeSpec", ()) if spec.get("nodeId")]
        if len(names) == self.job.num_slices:
            return names
        many = self.job.num_slices > 1
        return [f"{self.job.name}-{i}" for i in range(self.job.num_slices)] if many else [self.job.name]


_STATES = {
    **dict.fromkeys(["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"], State.WAITING),
    **dict.fromkeys(["SUSPENDING", "DELETING"], State.LEAVING),
    **dict.fromkeys(["SUSPENDED", "FAILED"], State.LOST),
}
# A state that nobody has heard of may bill; of what is being deleted nobody says whether it had chips.
_BILLING = {state: state in ("PROVISIONING", "SUSPENDING") for state in _STATES} | {"DELETING": None}


def common_flags(job: Job) -> list[str]:
    """Of both ways to create TPU VMs."""
    labels = ",".join(f"{key}={value}" for key, value in job.labels.items())
    flags = [f"--labels={labels}", "--scopes=https://www.googleapis.com/auth/cloud-platform"]
    for flag in ("network", "subnetwork", "service_account"):
        if getattr(job, flag):
            flags.append(f"--{flag.replace('_', '-')}={getattr(job, flag)}")
    flags += ["--internal-ips"] if job.internal_ips else []
    return [*flags, *([f"--{job.pricing}"] if job.pricing in ("spot", "reserved") else [])]


def ssh(group: Sequence[str], job: Job, at: Sequence[str], command: str, output: str) -> list[str]:
    """Of both ways: arguments that run a command on hosts, which `at` names."""
    what = [f"--command={command}", *([f"--output-directory={output}"] if output else [])]
    return [*group, "ssh", job.name, f"--zone={job.zone}", *at, *what, *_through(job)]


def scp(group: Sequence[str], job: Job, at: Sequence[str], sources: Sequence[str], target: str) -> list[str]:
    """Of both ways: arguments that copy files to hosts, which `at` names."""
    to = f"{job.name}:{target}"
    return [*group, "scp", *sources, to, f"--zone={job.zone}", *at, "--recurse", *_through(job)]


def _through(job: Job) -> list[str]:
    """How ssh and scp reach hosts."""
    if job.tunnel_through_iap:
        return ["--tunnel-through-iap"]
    return ["--internal-ip"] if job.internal_ips else []


def delete(gcloud: Gcloud, command: list[str], resource: str) -> None:
    """Deletes; what is not there is no error.

    Raises:
      GcloudError: anything else.
    """
    try:
        gcloud.run(*command, resource=resource)
    except GcloudError as error:
        if error.kind != "not_found":
            raise
