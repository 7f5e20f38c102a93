"""`memory_type="vector_db"`: search by FAISS. Within it, `import faiss` is the library."""
