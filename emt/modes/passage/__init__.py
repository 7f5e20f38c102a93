"""Passage mode: every layer attends to the rows of a few passages, in order."""
