"""Seconds a query over the number of queries on one document."""
