"""Counterfactual retrieval: documents in the prompt, in memory, or retrieved in chunks."""

from experiments.retrieval.report import draw, summary
from experiments.retrieval.run import run_retrieval as run
from experiments.retrieval.settings import RetrievalSettings as Settings

__all__ = ["Settings", "draw", "run", "summary"]
