"""TPU VMs created directly, again and again until chips are free: what granted quotas get when queues do not move."""

import dataclasses
from collections.abc import Sequence

from tpu.gcloud import Gcloud
from tpu.job import Job
from tpu.providers import Observation, observe_node
from tpu.providers.queued import common_flags, delete, scp, ssh

_GROUP = ("compute", "tpus", "tpu-vm")
_CREATE_SECONDS = 1800


@dataclasses.dataclass(frozen=True)
class Direct:
    """See `Provider`. Who creates again, and when, is `babysit`'s to say."""

    job: Job
    gcloud: Gcloud

    def create_command(self, seconds: float) -> list[str]:
        del seconds  # what GA creates has no end of its own
        job = self.job
        return [
            *_GROUP,
            "create",
            job.name,
            f"--zone={job.zone}",
            f"--accelerator-type={job.slice.accelerator_type}",
            f"--version={job.slice.generation.runtime}",
            *common_flags(job),
        ]

    def delete_command(self) -> list[str]:
        return [*_GROUP, "delete", self.job.name, f"--zone={self.job.zone}", "--async"]

    def create(self, seconds: float) -> None:
        # Not --async: only who waits is told that there is no capacity.
        self.gcloud.run(*self.create_command(seconds), timeout=_CREATE_SECONDS)

    def delete(self) -> None:
        delete(self.gcloud, self.delete_command(), f"nodes/{self.job.name}")

    def observe(self) -> Observation:
        return observe_node(self.gcloud, self.job, self.job.name)

    def ssh(self, command: str, worker: str = "all", node: str = "all", output: str = "") -> list[str]:
        del node  # there is one
        return ssh(self._group(), self.job, [f"--worker={worker}"], command, output)

    def scp(self, sources: Sequence[str], target: str, worker: str = "all", node: str = "all") -> list[str]:
        del node
        return scp(self._group(), self.job, [f"--worker={worker}"], sources, target)

    def _group(self) -> tuple[str, ...]:
        """GA's ssh cannot go through the proxy."""
        return ("alpha", *_GROUP) if self.job.tunnel_through_iap else _GROUP
