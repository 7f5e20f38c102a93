"""`/v1/models`: the one model that is served."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from emt.serving.errors import ServingError
from emt.serving.keys import access_of
from emt.serving.schemas import errors
from emt.serving.served import Served, served_of

router = APIRouter(prefix="/v1", tags=["models"], dependencies=[Depends(access_of)])


class Model(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "emt"


class Models(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/models", responses=errors(401, 403))
async def list_models(served: Annotated[Served, Depends(served_of)]) -> Models:
    """List the models."""
    return Models(data=[_model(served)])


@router.get("/models/{name:path}", responses=errors(401, 403, 404))
async def read_model(name: str, served: Annotated[Served, Depends(served_of)]) -> Model:
    """Describe a model."""
    check_model(served, name)
    return _model(served)


def check_model(served: Served, name: str) -> None:
    """Refuse the name of another model.

    Raises:
        ServingError: 404, naming the one that is served.
    """
    if name != served.model_name:
        raise ServingError(
            404,
            f"There is no model '{name:.200}' here. Ask for '{served.model_name}'.",
            param="model",
            code="model_not_found",
        )


def _model(served: Served) -> Model:
    return Model(id=served.model_name, created=served.created)
