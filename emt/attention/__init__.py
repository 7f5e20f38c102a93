"""Attention over memories as tensor functions. Knows torch, and no model."""
