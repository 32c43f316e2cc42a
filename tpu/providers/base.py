"""What ways to a slice have in common: one small interface, and the states of all of them in seven words."""

import dataclasses
import datetime
import enum
from collections.abc import Iterable
from typing import ClassVar

from tpu.gcloud import Gcloud, GcloudError
from tpu.job import Job

# On hosts, whoever launches: a launcher elsewhere finds what one here has left running.
ACCOUNT = "spiral"
COLLECTIONS = {"queued-resources": "queuedResources", "tpu-vm": "nodes"}  # as messages of the API name a kind


class State(enum.Enum):
    """What a slice is, as far as a launcher has to know."""

    GONE = "there is none"  # said explicitly
    WAITING = "waits for chips"
    READY = "ready"
    TRANSIENT = "not usable now, and comes back by itself"
    LEAVING = "being taken away"
    LOST = "lost: it keeps name and quota and never comes back"
    UNKNOWN = "not known"  # the question failed; nothing may be concluded


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the cloud says about a job's slice.

    Attributes:
      state: in our words.
      words: the cloud's own, as in `ACTIVE, pile-0 REPAIRING`.
      by_user: whether somebody of ours, not the service, brought it about.
      capacity: whether it was lost to others, not to a mistake in the request.
      message: of the cloud, about an error.
      symptoms: of nodes, as in `pile-0 2026-11-26T18:00:00Z OUT_OF_MEMORY worker 3`.
      billing: whether chips bill; None where that is not known, and what held before holds.
      since: Unix time from which the chips can have billed, as far as it is said.
      ours: whether it has the job's labels, if it is there; None where none are told.
    """

    state: State
    words: str = ""
    by_user: bool = False
    capacity: bool = True
    message: str = ""
    symptoms: tuple[str, ...] = ()
    billing: bool | None = None
    since: float = 0
    ours: bool | None = True


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to a slice, for one job. Every `..._command`, `ssh` and `scp` are arguments of gcloud."""

    job: Job
    gcloud: Gcloud

    kind: ClassVar[str]  # of what is created: `queued-resources` or `tpu-vm`
    create_seconds: ClassVar[float]  # after which nobody knows whether it was

    def create_command(self, seconds: float) -> list[str]:
        """Of a slice that the cloud itself may take away after so many seconds, where it can do so."""
        raise NotImplementedError

    def observe(self) -> Observation:
        """What the cloud says of the slice."""
        try:
            return self._observe()
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            return Observation(State.UNKNOWN, message=f"gcloud's answer has another shape ({error})")

    def _observe(self) -> Observation:
        """The same, where answers have the shape that they should have."""
        raise NotImplementedError

    def create(self, seconds: float) -> None:
        """Asks for the slice; returns when the request is taken, or (`vm`) the slice is there. Raises GcloudError."""
        self.gcloud.run(*self.create_command(seconds), timeout=self.create_seconds)

    def delete_command(self) -> list[str]:
        return delete_command(self.kind, self.job.name, self.job.zone)

    def delete(self) -> None:
        """Asks for its end; what is not there is no error. Raises GcloudError."""
        try:
            self.gcloud.run(*self.delete_command(), resource=f"{COLLECTIONS[self.kind]}/{self.job.name}")
        except GcloudError as error:
            if error.kind != "not_found":
                raise

    def ssh(self, command: str, host: int | None = None) -> list[str]:
        """Runs a shell command on all hosts, or on one."""
        return [*self._on_hosts("ssh"), self._address, *self._at(host), f"--command={command}", *self._through()]

    def scp(self, source: str, target: str, host: int | None = None) -> list[str]:
        """Copies a local file to a path on all hosts, or on one."""
        return [*self._on_hosts("scp"), source, f"{self._address}:{target}", *self._at(host), *self._through()]

    @property
    def _address(self) -> str:
        return f"{ACCOUNT}@{self.job.name}"

    def _on_hosts(self, verb: str) -> list[str]:
        return ["compute", "tpus", self.kind, verb]

    def _at(self, host: int | None) -> list[str]:
        """Which hosts of which nodes; a node by itself is named already."""
        node, worker = ("all", "all") if host is None else divmod(host, self.job.slice.hosts)
        of_nodes = [f"--node={node}"] if self.kind == "queued-resources" else []
        return [f"--zone={self.job.zone}", *of_nodes, f"--worker={worker}"]

    def _through(self) -> list[str]:
        """How they are reached."""
        if self.job.tunnel_through_iap:
            return ["--tunnel-through-iap"]
        return ["--internal-ip"] if self.job.internal_ips else []

    def _common_flags(self) -> list[str]:
        """Of every create."""
        job = self.job
        flags = [
            f"--labels={','.join(map('='.join, job.labels.items()))}",
            "--scopes=https://www.googleapis.com/auth/cloud-platform",
        ]
        for flag in ("network", "subnetwork", "service_account"):
            if value := getattr(job, flag):
                flags.append(f"--{flag.replace('_', '-')}={value}")
        flags += ["--internal-ips"] if job.internal_ips else []
        return [*flags, *([f"--{job.pricing}"] if job.pricing in ("spot", "reserved") else [])]


def is_of(job: Job, labels: dict[str, str] | None) -> bool | None:
    """Whether labels are those of a job; None where there are none."""
    return job.labels.items() <= labels.items() if labels else None


def delete_command(kind: str, name: str, zone: str) -> list[str]:
    """Arguments of gcloud that delete a queued resource with its nodes, or a node."""
    force = ["--force"] if kind == "queued-resources" else []
    return ["compute", "tpus", kind, "delete", name, f"--zone={zone}", *force, "--async"]


NODE_STATES = {
    "READY": State.READY,
    "CREATING": State.WAITING,
    **dict.fromkeys(["RESTARTING", "REIMAGING", "REPAIRING", "STARTING"], State.TRANSIENT),
    **dict.fromkeys(["HIDING", "HIDDEN", "UNHIDING", "UNKNOWN"], State.TRANSIENT),  # UNKNOWN: after a failed repair
    **dict.fromkeys(["DELETING", "STOPPING"], State.LEAVING),
    **dict.fromkeys(["STOPPED", "PREEMPTED", "TERMINATED"], State.LOST),
}
FREE = (State.WAITING, State.LOST)  # nodes in these do not bill


def observe_node(gcloud: Gcloud, job: Job, name: str) -> Observation:
    """The state of one node; one that is explicitly not there is GONE."""
    where = ("compute", "tpus", "tpu-vm", "describe", name, f"--zone={job.zone}")
    try:
        node = gcloud.json(*where, resource=f"nodes/{name}")
    except GcloudError as error:
        return unanswered(error, f"{name} NOT_FOUND")
    word, health = node.get("state", ""), node.get("health", "")
    state = NODE_STATES.get(word, State.UNKNOWN)
    if state is State.READY and health in ("UNHEALTHY_MAINTENANCE", "TIMEOUT"):
        state, word = State.TRANSIENT, f"{word} {health}"
    return Observation(
        state,
        words=f"{name} {word or 'without a state'}",
        message=node.get("healthDescription", ""),
        symptoms=tuple(
            " ".join([name, s.get("createTime", ""), s.get("symptomType", ""), "worker", s.get("workerId", "?")])
            for s in node.get("symptoms", ())
        ),
        billing=state not in FREE,
        since=_seconds(node.get("createTime", "")),
        ours=is_of(job, node.get("labels")),
    )


def whole(nodes: Iterable[Observation]) -> Observation:
    """All nodes of a slice, or of several, as one: as good as the worst of them. A node that is gone is lost."""
    nodes = list(nodes)
    states = {State.LOST if node.state is State.GONE else node.state for node in nodes}
    worst = (State.LOST, State.UNKNOWN, State.LEAVING, State.TRANSIENT, State.WAITING, State.READY)
    billing = [node.billing for node in nodes]
    return Observation(
        next(state for state in worst if state in states),
        words=", ".join(node.words for node in nodes),
        message="; ".join(node.message for node in nodes if node.message),
        symptoms=tuple(line for node in nodes for line in node.symptoms),
        billing=True if True in billing else None if None in billing else False,
        since=min((node.since for node in nodes if node.since), default=0),
    )


def unanswered(error: GcloudError, words: str = "NOT_FOUND") -> Observation:
    """What a question that failed says: GONE only if it was told so."""
    gone = error.kind == "not_found"
    state = State.GONE if gone else State.UNKNOWN
    return Observation(state, words=words if gone else "", message=str(error), billing=False if gone else None)


def _seconds(stamp: str) -> float:
    """Unix time of `2026-11-26T18:00:00.123456789Z`; 0 if it is none."""
    try:
        return datetime.datetime.fromisoformat(stamp[:19] + "+00:00").timestamp()
    except ValueError:
        return 0
