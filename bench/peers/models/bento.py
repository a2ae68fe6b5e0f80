# pyright: basic, reportMissingImports=false
"""The no-op model as a BentoML task: `bentoml serve bento:Noop`."""

import bentoml
from job import work


# Waiting in the queue counts for the timeout, and a trial must not mistake a long queue for a lost job.
@bentoml.service(traffic={"timeout": 600})
class Noop:
    @bentoml.task
    def run(self, tag: str, seconds: float, image: str) -> str:
        work(tag, seconds)
        return image
