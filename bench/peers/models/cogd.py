# pyright: basic, reportMissingImports=false
"""The no-op model behind cog: `COG_PREDICT_TYPE_STUB=cogd.py:Predictor python -m cog.server.http`."""

from cog import BasePredictor
from job import work


class Predictor(BasePredictor):
    def predict(self, tag: str, seconds: float, image: str) -> str:
        work(tag, seconds)
        return image
