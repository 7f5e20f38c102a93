"""Answers over topk, attention to memories by head, citation precision."""
