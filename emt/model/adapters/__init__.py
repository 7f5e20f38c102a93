"""Adapters for attention classes that compute inline, without transformers' interface."""
