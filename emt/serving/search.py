"""The route of search: passages, and nothing is generated."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
