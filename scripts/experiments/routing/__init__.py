"""Routing: how often the passage that answers a question is found, in memories of several sizes."""
