"""Carries one HTTP request to its host and the answer back, both through h11."""

from __future__ import annotations

import asyncio

import h11

from platform_validator.egress.dialing import Stream
from platform_validator.egress.flow import Flow
from platform_validator.egress.http_forward import MAX_HEAD, backward
from platform_validator.egress.refusals import Reason, Refused

HEAD_WITHIN = 10.0
"""Seconds for the head of a request."""
_CHUNK = 64 * 1024


async def read_request(connection: h11.Connection, guest: Stream) -> h11.Request | None:
    """The head of the guest's request; None when it ended without one.

    Raises:
        Refused: BAD_REQUEST, or SLOW: it was not there in ten seconds.
    """
    try:
        async with asyncio.timeout(HEAD_WITHIN):
            while (event := connection.next_event()) is h11.NEED_DATA:
                connection.receive_data(await guest[0].read(_CHUNK))
    except TimeoutError as error:
        raise Refused(Reason.SLOW, f"expected a request's head within {HEAD_WITHIN:g} s") from error
    except h11.RemoteProtocolError as error:
        raise Refused(Reason.BAD_REQUEST, f"expected an HTTP/1.1 request: {error}"[:200]) from error
    return event if isinstance(event, h11.Request) else None


async def exchange(
    connection: h11.Connection, request: h11.Request, *, guest: Stream, host: Stream, flow: Flow
) -> None:
    """Send the request, whose body `connection` still reads, and give the answer back.

    Raises:
        Refused: BAD_ANSWER before anything was given back, BAD_REQUEST, BYTES_SPENT.
        OSError: A side broke off.
    """
    upstream = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
    try:
        await flow.send(host, _bytes(upstream, request))
        if connection.they_are_waiting_for_100_continue:
            await flow.give(guest, _bytes(connection, h11.InformationalResponse(status_code=100, headers=[])))
    except h11.LocalProtocolError as error:
        raise Refused(Reason.BAD_REQUEST, f"the request cannot be sent on: {error}"[:200]) from error
    sending = asyncio.ensure_future(_send_body(connection, upstream, guest=guest, host=host, flow=flow))
    answering = asyncio.ensure_future(_give_answer(connection, upstream, guest=guest, host=host, flow=flow))
    try:
        # An answer may come before the body is sent; a body that breaks off ends both.
        await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_EXCEPTION)
        if sending.done() and not answering.done():
            sending.result()
        await answering
    finally:
        sending.cancel()
        answering.cancel()
        await asyncio.wait({sending, answering})


async def _send_body(
    connection: h11.Connection, upstream: h11.Connection, *, guest: Stream, host: Stream, flow: Flow
) -> None:
    try:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await guest[0].read(_CHUNK))
            elif isinstance(event, h11.Data | h11.EndOfMessage):
                # Trailers are the hop's own.
                end = h11.EndOfMessage() if isinstance(event, h11.EndOfMessage) else event
                await flow.send(host, _bytes(upstream, end))
                if end is not event:
                    return
            else:
                raise Refused(Reason.BAD_REQUEST, "expected the body that the request's head announced")
    except h11.ProtocolError as error:
        raise Refused(Reason.BAD_REQUEST, f"expected the body as announced: {error}"[:200]) from error


async def _give_answer(
    connection: h11.Connection, upstream: h11.Connection, *, guest: Stream, host: Stream, flow: Flow
) -> None:
    try:
        while True:
            event = upstream.next_event()
            if event is h11.NEED_DATA:
                upstream.receive_data(await host[0].read(_CHUNK))
            elif isinstance(event, h11.Response):
                await flow.give(guest, _bytes(connection, backward(event)))
            elif isinstance(event, h11.Data):
                await flow.give(guest, _bytes(connection, h11.Data(event.data)))
            elif isinstance(event, h11.EndOfMessage):
                await flow.give(guest, _bytes(connection, h11.EndOfMessage()))
                return
            elif not isinstance(event, h11.InformationalResponse):
                raise Refused(Reason.BAD_ANSWER, "the host ended before its answer did")
    except h11.ProtocolError as error:
        raise Refused(Reason.BAD_ANSWER, f"the host's answer is not HTTP/1.1: {error}"[:200]) from error


def _bytes(connection: h11.Connection, event: h11.Event) -> bytes:
    return connection.send(event) or b""
