"""Files to documents, documents to windows, windows to rows."""
