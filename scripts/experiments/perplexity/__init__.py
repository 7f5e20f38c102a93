"""Perplexity over length: what text beyond the local window is worth."""
