"""Queued resources: a request that waits for chips. v4, v5e, v5p and v6e, one slice or several."""

import dataclasses
from typing import Any

from tpu.gcloud import GcloudError
from tpu.providers.base import Observation, Provider, State, is_of, observe_node, unanswered, whole

_LONGEST = 7 * 86400  # seconds that a flex-start slice may live

# google.rpc.Code of a request that others' use of the chips has ended: RESOURCE_EXHAUSTED, ABORTED, INTERNAL,
# UNAVAILABLE.
_CAPACITY_CODES = (8, 10, 13, 14)

# What a state means, and whether chips bill; of what is being deleted nobody says whether it had any. ACTIVE is as its
# nodes are.
_STATES = {
    **dict.fromkeys(["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES"], (State.WAITING, False)),
    "PROVISIONING": (State.WAITING, True),
    "SUSPENDING": (State.LEAVING, True),
    "DELETING": (State.LEAVING, None),
    **dict.fromkeys(["SUSPENDED", "FAILED"], (State.LOST, False)),
}


def meaning(word: str) -> tuple[State, bool | None]:
    """Of a state: ours, and whether chips bill. One that nobody has heard of may."""
    return _STATES.get(word, (State.UNKNOWN, True))


class Queued(Provider):
    kind = "queued-resources"
    create_seconds = 90  # ended before the babysitter takes a "not found" for an answer (`LANDS`)

    def create_command(self, seconds: float) -> list[str]:
        job = self.job
        many, flex = job.num_slices > 1, job.pricing == "flex_start"
        command = [
            *(["alpha"] if flex else []),
            *("compute", "tpus", self.kind, "create", job.name, f"--zone={job.zone}"),
            f"--accelerator-type={job.slice.accelerator_type}",
            f"--runtime-version={job.slice.generation.runtime}",
            *([f"--node-count={job.num_slices}", f"--node-prefix={job.name}"] if many else [f"--node-id={job.name}"]),
        ]
        if flex:
            # Then the cloud itself ends what the launcher cannot, should it be dead by then.
            command += ["--provisioning-model=flex-start", f"--max-run-duration={int(min(seconds, _LONGEST))}s"]
        return [*command, *self._common_flags(), "--async"]

    def _observe(self) -> Observation:
        job = self.job
        command = ["compute", "tpus", self.kind, "describe", job.name, f"--zone={job.zone}"]
        try:
            found = self.gcloud.json(*command, resource=f"queuedResources/{job.name}")
        except GcloudError as error:
            return unanswered(error)
        status = found.get("state", {})
        word = status.get("state", "")
        ours = is_of(job, (found.get("tpu", {}).get("nodeSpec") or [{}])[0].get("node", {}).get("labels"))
        if word == "ACTIVE":
            nodes = whole(observe_node(self.gcloud, job, name) for name in self._nodes(found))
            return dataclasses.replace(nodes, words=f"ACTIVE, {nodes.words}", ours=ours)
        failed = status.get("failedData", {}).get("error", {})
        state, billing = meaning(word)
        return Observation(
            state,
            words=word or "without a state",
            by_user=status.get("stateInitiator") == "USER" and word in ("SUSPENDING", "SUSPENDED"),
            capacity=word != "FAILED" or failed.get("code") in _CAPACITY_CODES,
            message=failed.get("message", ""),
            billing=billing,
            ours=ours,
        )

    def _nodes(self, found: dict[str, Any]) -> list[str]:
        """Names of the nodes. The service writes a `nodeSpec` for each; before, they follow from the prefix."""
        name, count = self.job.name, self.job.num_slices
        names = [spec["nodeId"] for spec in found.get("tpu", {}).get("nodeSpec", ()) if spec.get("nodeId")]
        return names if len(names) == count else [f"{name}-{i}" for i in range(count)] if count > 1 else [name]
