"""`Memory`: what a model remembers."""

from emt.memory.memory import Memory as Memory
