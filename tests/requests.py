"""Requests and images that several tests make."""

import io
from functools import cache
from typing import Any
from uuid import UUID

from PIL import Image
from starlette.testclient import TestClient


def body_of(image: str, **params: object) -> dict[str, Any]:
    return {"model": "clarity-upscale", "clarityUpscaleParams": {"image": image, **params}}


def superres_body(image: str, **params: object) -> dict[str, Any]:
    return {"model": "superres", "superresParams": {"image": image, **params}}


def submit(client: TestClient, image: str, **params: object) -> UUID:
    response = client.post("/v2/images/upscale", json=body_of(image, **params))
    assert response.status_code == 202, response.text
    return UUID(response.json()["jobId"])


def upload(client: TestClient, data: bytes) -> str:
    response = client.post("/v2/uploads", files={"file": data})
    assert response.status_code == 201, response.text
    return f"upload://{response.json()['id']}"


def finished(client: TestClient, job_id: UUID) -> dict[str, Any]:
    return client.get(f"/v2/jobs/{job_id}").json()


def failure(client: TestClient, job_id: UUID) -> tuple[str, str, str]:
    job = finished(client, job_id)
    return job["status"], job["errorCode"], job["error"]


@cache
def png(width: int, height: int) -> bytes:
    return encoded(Image.linear_gradient("L").resize((width, height)).convert("RGB"), "PNG")


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()
