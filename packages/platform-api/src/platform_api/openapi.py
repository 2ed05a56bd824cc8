"""The OpenAPI document: bodies that are read by hand, callers, and problems."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

_SIGNED = {
    "X-Timestamp": "Unix milliseconds",
    "X-Nonce": "32 hex digits, fresh for every try",
    "X-Signature": "hex, sr25519 over platform-request-v1 of the request",
}
_REF = "#/components/schemas/{model}"
_bodies: dict[str, type[BaseModel]] = {}


def accepts(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `model` from its body."""
    _bodies[model.__name__] = model
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI) -> None:
    """Make `app` answer the whole document at `/openapi.json`."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(plain())
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign] # FastAPI's documented way to extend it


def _complete(found: dict[str, Any]) -> dict[str, Any]:
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name, model in _bodies.items():
        schema = model.model_json_schema(ref_template=_REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[name] = schema
    schemas["Problem"] = _problem()
    components["securitySchemes"] = {
        "administrator": {"type": "http", "scheme": "bearer"},
        "validator": _header_scheme("X-Validator-Hotkey", {**_SIGNED, "X-Validator-Instance": "a UUID"}),
        "miner": _header_scheme("X-Miner-Hotkey", _SIGNED),
    }
    refused = {
        "description": "A problem (RFC 9457)",
        "content": {"application/problem+json": {"schema": {"$ref": _REF.format(model="Problem")}}},
    }
    for operations in found["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = refused
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    return found


def _header_scheme(hotkey: str, beside: dict[str, str]) -> dict[str, Any]:
    described = "; ".join(f"{name}: {meaning}" for name, meaning in beside.items())
    return {"type": "apiKey", "in": "header", "name": hotkey, "description": f"SS58 address. {described}"}


def _problem() -> dict[str, Any]:
    text = {"type": "string"}
    return {
        "type": "object",
        "required": ["type", "title", "status", "detail", "code"],
        "properties": {
            **dict.fromkeys(("type", "title", "detail"), text),
            "status": {"type": "integer"},
            "code": {**text, "description": "a stable snake_case word"},
        },
    }
