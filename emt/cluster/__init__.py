"""Reading documents on several machines, with Ray."""
