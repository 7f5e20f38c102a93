"""Token mode: each query attends to the memories that are nearest to it."""
