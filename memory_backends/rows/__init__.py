"""Rows of keys and values, as tensors on a device or as coded records in mapped files."""
