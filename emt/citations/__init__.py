"""What queries attended to, recorded, and the documents and quotes that it comes from."""
