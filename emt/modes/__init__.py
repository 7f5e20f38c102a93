"""The two ways in which a forward uses a memory: token mode and passage mode."""
