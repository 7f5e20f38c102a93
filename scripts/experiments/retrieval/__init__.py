"""Counterfactual retrieval from one document: in the prompt, in memory, or in chunks."""
