"""Counterfactual retrieval: documents in the prompt, in memory, or retrieved in chunks."""
