"""A chat of several turns, in one cache, which the memory can remember as it is said."""
