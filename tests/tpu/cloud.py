"""A cloud in virtual time that answers like `gcloud compute tpus`, and keeps account of what really bills.

`Cloud.execute` stands for the program in tests that run in one process; `gcloud_double.py` is the program itself.
Written from the messages of the API (Node, QueuedResource, Status) and error texts of public reports, not from `tpu/`.
"""

import dataclasses
import json
import re
import subprocess
import time
from typing import Any

P = "projects/my-project/locations"
EVER = float("inf")

# What becomes of a request: seconds since the create, and what is so from then on.
QUEUED = [
    {"at": 0, "state": "ACCEPTED"},
    {"at": 30, "state": "WAITING_FOR_RESOURCES"},
    {"at": 60, "state": "PROVISIONING"},
    {"at": 120, "state": "ACTIVE"},
]
DIRECT = [{"at": 0, "state": "CREATING"}, {"at": 60, "state": "READY"}]

ERRORS = {
    "network": "ERROR: gcloud crashed (TransportError): HTTPSConnectionPool(host='oauth2.googleapis.com', port=443): "
    "Max retries exceeded with url: /token (Caused by NewConnectionError: Failed to establish a new connection: "
    "[Errno -3] Temporary failure in name resolution)",
    "auth": "ERROR: (gcloud.compute.tpus.{verb}) There was a problem refreshing your current auth tokens: "
    "Reauthentication failed. cannot prompt during non-interactive execution.\nPlease run:\n\n  $ gcloud auth login\n",
    "no_account": "ERROR: (gcloud.compute.tpus.{verb}) You do not currently have an active account selected.",
    "denied": "ERROR: (gcloud.compute.tpus.{verb}) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on "
    "'projects/my-project/locations/us-east5-a'. This command is authenticated as me@example.com",
    "no_project": "ERROR: (gcloud.compute.tpus.{verb}) NOT_FOUND: Resource 'projects/my-project/locations/us-east5-a' "
    "was not found. This command is authenticated as me@example.com which is the active account",
    "invalid": "ERROR: (gcloud.compute.tpus.{verb}) INVALID_ARGUMENT: Cloud TPU received a bad request. The requested "
    'accelerator configuration for accelerator type, "v5p-128", could not be found in the zonal accelerator '
    'configurations for "us-east5-a". [EID: 0x1]',
    "quota": "ERROR: (gcloud.compute.tpus.{verb}) RESOURCE_EXHAUSTED: Quota limit "
    "'TPUV5PPreemptiblePerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-east5-a.",
    "http_quota": "ERROR: (gcloud.compute.tpus.{verb}) HttpError accessing <https://tpu.googleapis.com/v2/projects/p>: "
    'response: <{{\'status\': 429}}>, content <{{ "error": {{ "code": 429, "message": "Quota limit '
    '\'TPUV6EPreemptiblePerProjectPerRegionForTPUAPI\' has been exceeded. Limit: 0 in region us-east5.", "status": '
    '"RESOURCE_EXHAUSTED" }} }}>',
    "capacity": "Create request issued for: [pile]\nWaiting for operation [{p}/us-east5-a/operations/operation-17] to "
    'complete...failed.\nERROR: (gcloud.compute.tpus.{verb}) {{\n  "code": 8,\n  "message": "There is no more capacity '
    'in the zone \\"us-east5-a\\"; you can try in another zone where Cloud TPU Nodes are offered (see '
    'https://cloud.google.com/tpu/docs/regions) [EID: 0x9f48947a7d57c8d]"\n}}',
    "internal": 'ERROR: (gcloud.compute.tpus.{verb}) {{\n  "code": 13,\n  "message": "an internal error"\n}}',
    "503": "ERROR: (gcloud.compute.tpus.{verb}) UNAVAILABLE: The service is currently unavailable.",
}


@dataclasses.dataclass
class Slice:
    """One incarnation of a queued resource or node."""

    kind: str  # queued-resources or tpu-vm
    name: str
    zone: str
    request: dict[str, Any]
    created: float
    timeline: list[dict[str, Any]]
    deleted: float = EVER  # when the deletion was asked for
    gone: float = EVER

    def at(self, now: float) -> dict[str, Any] | None:
        """What is so at a time; None if it is not there."""
        if not self.created <= now < self.gone:
            return None
        event = [event for event in self.timeline if event["at"] <= now - self.created][-1]
        if event["state"] == "GONE":
            return None
        if now >= self.deleted:
            return event | {"state": "DELETING", "initiator": "USER", "was": event["state"]}
        return event

    def nodes(self, now: float) -> dict[str, dict[str, Any]]:
        """Nodes that are there, by name."""
        event = self.at(now)
        if event is None:
            return {}
        if self.kind == "tpu-vm":
            return {self.name: event}
        if event.get("was", event["state"]) not in ("PROVISIONING", "ACTIVE", "SUSPENDING"):
            return {}
        usual = {"PROVISIONING": "CREATING", "ACTIVE": "READY"}.get(event["state"], "DELETING")
        found = {}
        for i, name in enumerate(self.request["nodes"]):
            given = event.get("nodes", {}).get(str(i), {"state": usual})
            if given is not None:
                found[name] = given
        return found

    def bills(self, now: float) -> bool:
        dead = ("CREATING", "PREEMPTED", "TERMINATED", "STOPPED")
        return any(node.get("was", node["state"]) not in dead for node in self.nodes(now).values())

    def usable(self, now: float) -> bool:
        nodes = self.nodes(now)
        return len(nodes) == len(self.request["nodes"]) and all(node["state"] == "READY" for node in nodes.values())


class Cloud:
    """The service, and its CLI.

    Args:
      script: `timelines`, of one incarnation after another (the last again and again); `fail`, a list of {"when":
        regular expression on the command, "error": of ERRORS, or `hang` or `missing`, "from", "to": times since the
        start, or "nth": which such commands, "effect": whether it takes effect all the same}; `lands`, seconds from a
        create to its effect; `deletes`, seconds a deletion takes; `create_seconds`, that `vm`'s takes.
      start: when it begins.
    """

    def __init__(self, script: dict[str, Any] | None = None, start: float = 1_000_000.0) -> None:
        self.script, self.start, self.now = script or {}, start, start
        self.slices: list[Slice] = []
        self.log: list[tuple[float, str]] = []
        self.seen: dict[str, int] = {}
        self.call_seconds = self.script.get("call_seconds", 2)

    def execute(self, arguments: list[str], timeout: float = EVER) -> tuple[int, str, str]:
        """Runs one command, as `tpu.gcloud.execute` does."""
        line = " ".join(arguments)
        self.log.append((self.now, line))
        words = [word for word in arguments[1:] if not word.startswith("-")]
        words = words[1:] if words[0] in ("alpha", "beta") else words
        if words == ["config", "get-value", "project"]:
            return 0, self.script.get("project", "my-project") + "\n", ""
        if words[:2] != ["compute", "tpus"] or words[2] not in ("queued-resources", "tpu-vm"):
            return 2, "", f"ERROR: (gcloud) Invalid choice: '{' '.join(words[:3])}'."
        kind, verb = words[2], words[3]
        flags = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
        fault = self._fault(line)
        if fault and not fault.get("effect"):
            if fault["error"] == "hang":
                self.now += min(timeout, 3600)
                raise subprocess.TimeoutExpired(arguments, timeout)
            self.now += self.call_seconds
            if fault["error"] == "missing":
                return self._missing(kind, verb, words[4], flags["zone"])
            return self._error(fault["error"], kind, verb)
        self.now += self.call_seconds
        answer = getattr(self, f"_{verb}")(kind, words[4:], flags)
        return self._error(fault["error"], kind, verb) if fault else answer

    def there(self, now: float | None = None) -> list[Slice]:
        now = self.now if now is None else now
        return [one for one in self.slices if one.at(now)]

    def billed(self, step: float = 1.0) -> float:
        """Slice-seconds that were really billed, until now."""
        total = 0.0
        for one in self.slices:
            edges = sorted(
                {one.created + event["at"] for event in one.timeline} | {one.created, self.now, one.gone, one.deleted}
            )
            for left, right in zip(edges, edges[1:], strict=False):
                if right <= self.now and one.bills(left):
                    total += right - left
        return total

    def _fault(self, line: str) -> dict[str, Any] | None:
        for i, fault in enumerate(self.script.get("fail", ())):
            if re.search(fault["when"], line):
                count = self.seen[str(i)] = self.seen.get(str(i), 0) + 1
                since = self.now - self.start
                if ("nth" in fault and count in fault["nth"]) or (
                    "nth" not in fault and fault.get("from", 0) <= since < fault.get("to", EVER)
                ):
                    return fault
        return None

    def _error(self, name: str, kind: str, verb: str) -> tuple[int, str, str]:
        return 1, "", ERRORS[name].format(verb=f"{kind}.{verb}", p=P) + "\n"

    def _find(self, kind: str, name: str, zone: str) -> Slice | None:
        for one in self.slices:
            if one.zone == zone and one.at(self.now):
                if one.kind == kind and one.name == name:
                    return one
                if kind == "tpu-vm" and name in one.nodes(self.now):
                    return one
        return None

    def _missing(self, kind: str, verb: str, name: str, zone: str) -> tuple[int, str, str]:
        collection = {"queued-resources": "queuedResources", "tpu-vm": "nodes"}[kind]
        text = f"NOT_FOUND: Resource '{P}/{zone}/{collection}/{name}' was not found."
        return (
            1,
            "",
            f"ERROR: (gcloud.compute.tpus.{kind}.{verb}) {text} This command is authenticated as me@example.com\n",
        )

    def _create(self, kind: str, words: list[str], flags: dict[str, str]) -> tuple[int, str, str]:
        name, zone = words[0], flags["zone"]
        if any(one.name == name and one.zone == zone and one.at(max(self.now, one.created)) for one in self.slices):
            text = f"ALREADY_EXISTS: Resource '{P}/{zone}/{kind}/{name}' already exists"
            return 1, "", f"ERROR: (gcloud.compute.tpus.{kind}.create) {text}\n"
        timelines = self.script.get("timelines") or [QUEUED if kind == "queued-resources" else DIRECT]
        timeline = timelines[min(len(self.slices), len(timelines) - 1)]
        count = int(flags.get("node-count", 1))
        nodes = [f"{flags['node-prefix']}-{i}" for i in range(count)] if count > 1 else [flags.get("node-id", name)]
        request = {
            "nodes": nodes,
            "acceleratorType": flags["accelerator-type"],
            "runtimeVersion": flags.get("runtime-version", flags.get("version")),
            "labels": dict(pair.split("=") for pair in flags["labels"].split(",")) if "labels" in flags else {},
            "spot": "spot" in flags,
        }
        self.slices.append(Slice(kind, name, zone, request, self.now + self.script.get("lands", 0), timeline))
        if kind == "tpu-vm" and "async" not in flags:
            self.now += self.script.get("create_seconds", 60)
        return 0, "", f"Create request issued for: [{name}]\n"

    def _delete(self, kind: str, words: list[str], flags: dict[str, str]) -> tuple[int, str, str]:
        one = self._find(kind, words[0], flags["zone"])
        if one is None:
            return self._missing(kind, "delete", words[0], flags["zone"])
        word = (one.at(self.now) or {})["state"]
        if kind == "queued-resources" and "force" not in flags and word not in ("ACCEPTED", "FAILED", "SUSPENDED"):
            text = f"FAILED_PRECONDITION: Queued resource is {word}; its nodes must be deleted first"
            return 1, "", f"ERROR: (gcloud.compute.tpus.{kind}.delete) {text}\n"
        if one.deleted == EVER:
            one.deleted, one.gone = self.now, self.now + self.script.get("deletes", 60)
        return 0, "", f"Delete request issued for: [{words[0]}]\n"

    def _describe(self, kind: str, words: list[str], flags: dict[str, str]) -> tuple[int, str, str]:
        one = self._find(kind, words[0], flags["zone"])
        if one is None:
            return self._missing(kind, "describe", words[0], flags["zone"])
        return 0, json.dumps(self._queued(one) if kind == "queued-resources" else self._node(one, words[0])), ""

    def _list(self, kind: str, words: list[str], flags: dict[str, str]) -> tuple[int, str, str]:
        there = [one for one in self.there() if one.zone == flags["zone"]]
        if kind == "queued-resources":
            return 0, json.dumps([self._queued(one) for one in there if one.kind == kind]), ""
        return 0, json.dumps([self._node(one, name) for one in there for name in one.nodes(self.now)]), ""

    def _ssh(self, kind: str, words: list[str], flags: dict[str, str]) -> tuple[int, str, str]:
        # The same account for every launcher, or one would not see what another has left running.
        (name,) = (word.removeprefix("spiral@").partition(":")[0] for word in words if word.startswith("spiral@"))
        one = self._find(kind, name, flags["zone"])
        if one is None:
            return self._missing(kind, "ssh", name, flags["zone"])
        return (
            (0, "", "")
            if one.usable(self.now)
            else (255, "", "ssh: connect to host 10.0.0.2 port 22: Connection refused")
        )

    _scp = _ssh

    def _queued(self, one: Slice) -> dict[str, Any]:
        event = one.at(self.now)
        assert event
        word = event["state"]
        key = re.sub(r"_(.)", lambda m: m[1].upper(), word.lower()) + "Data"
        state = {"state": word, "stateInitiator": event.get("initiator", "SERVICE")}
        if word not in ("WAITING_FOR_RESOURCES",):
            state[key] = {"error": event["error"]} if "error" in event else {}
        spec = {k: one.request[k] for k in ("acceleratorType", "labels", "runtimeVersion")}
        return {
            "createTime": _stamp(one.created),
            "name": f"{P}/{one.zone}/queuedResources/{one.name}",
            **({"spot": {}} if one.request["spot"] else {}),
            "state": state,
            "tpu": {
                "nodeSpec": [
                    {"node": spec, "nodeId": node, "parent": f"{P}/{one.zone}"} for node in one.request["nodes"]
                ]
            },
        }

    def _node(self, one: Slice, name: str) -> dict[str, Any]:
        event = one.nodes(self.now)[name]
        return {
            "acceleratorType": one.request["acceleratorType"],
            "apiVersion": "V2",
            "createTime": _stamp(one.created),
            "health": event.get("health", "HEALTHY"),
            "id": "4711",
            "labels": one.request["labels"],
            "name": f"{P}/{one.zone}/nodes/{name}",
            "networkEndpoints": [{"ipAddress": "10.0.0.2", "port": 8470}],
            "runtimeVersion": one.request["runtimeVersion"],
            "schedulingConfig": {"spot": True} if one.request["spot"] else {},
            "state": event["state"],
            **({"queuedResource": f"{P}/{one.zone}/queuedResources/{one.name}"} if one.kind != "tpu-vm" else {}),
            **({"symptoms": event["symptoms"]} if "symptoms" in event else {}),
            **({"healthDescription": event["description"]} if "description" in event else {}),
        }


def _stamp(now: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000000Z", time.gmtime(now))
