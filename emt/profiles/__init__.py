"""Head profiles: which few heads of a model know the passage that a question is about."""
