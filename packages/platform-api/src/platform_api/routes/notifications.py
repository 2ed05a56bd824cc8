"""The WebSocket over which validators are notified."""

from __future__ import annotations

from fastapi import APIRouter, WebSocket
from sqlalchemy.exc import SQLAlchemyError

from platform_api.errors import ApiError
from platform_api.problems import database_error, problem
from platform_api.services import Services, signed_form

router = APIRouter()


@router.websocket("/validators/{hotkey}/ws")
async def notifications(socket: WebSocket, hotkey: str) -> None:
    """Push notifications; the upgrade is signed like a GET."""
    api: Services = socket.app.state.services
    try:
        signed = await api.auth.validator(signed_form(socket, "GET", b""))
        if signed.hotkey != hotkey:
            raise ApiError(403, "hotkey_mismatch", "the path's hotkey is not the header's")
    except (ApiError, SQLAlchemyError) as error:
        refusal = error if isinstance(error, ApiError) else database_error(error)
        api.metrics.refused(refusal.status, refusal.code)
        await socket.send_denial_response(problem(refusal))
        return
    await socket.accept()
    await api.push.serve(socket, signed)
