"""Ways to a slice."""

from tpu.gcloud import Gcloud
from tpu.job import Job
from tpu.providers.base import Observation, Provider, State
from tpu.providers.direct import Direct
from tpu.providers.queued import Queued

__all__ = ["Observation", "Provider", "State", "provider_of"]


def provider_of(job: Job, gcloud: Gcloud) -> Provider:
    """Of a job whose provider is `qr` or `vm`."""
    return Queued(job, gcloud) if job.provider == "qr" else Direct(job, gcloud)
