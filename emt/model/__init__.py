"""A Hugging Face model, seen from outside: its attention calls, rotations, positions, devices."""
