"""The routes of documents: list, read, write and remove."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
