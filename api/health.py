"""GET /healthz and /readyz: for load balancers, not for callers."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import text

from api.dependencies import PartsDep
from api.errors import documented

router = APIRouter(tags=["health"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"


@router.get("/healthz", responses=documented())
async def healthz() -> Health:
    """Answer as long as the process can."""
    return Health()


@router.get("/readyz", responses=documented())
async def readyz(parts: PartsDep) -> Health:
    """Answer 200 when the database can be reached. Redis does not matter: without it jobs are accepted and wait."""
    async with parts.database.connection() as connection:
        await connection.execute(text("SELECT 1"))
    return Health()
