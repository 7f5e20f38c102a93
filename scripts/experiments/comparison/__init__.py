"""Question sets under conditions: what people deploy, and what emt does, at equal tokens."""
