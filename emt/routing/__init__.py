"""Routing: from a prompt to the passages of a memory that it is about."""
