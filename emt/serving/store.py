"""The route of the store's figures."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
