"""The trusted roots of each TLS context, and TLS connections on asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import datetime
import os
import socket
import ssl
from pathlib import Path

import httpx
import pytest
from support.transport_clients import endless, failure, push, transporting
from support.transport_servers import (
    CHUNKED,
    EMPTY,
    LIVENESS,
    OK,
    Certificates,
    Peer,
    always,
    chunk,
    on_both_loops,
    post,
    serving,
    settled,
)

from proxy.transport import tls


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return Certificates()


YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


# ---- the contexts ---------------------------------------------------------------------------------------------------


def test_the_default_context_is_made_once() -> None:
    """It verifies the certificate and the name, and is shared: reading the roots again would take 20 ms each time."""
    context = tls.default_ssl_context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert tls.default_ssl_context() is context


def test_without_a_file_the_upstream_has_the_default_context() -> None:
    """Without `ca_file`, None selects the default context."""
    assert tls.upstream_ssl_context("") is None


def test_a_file_adds_its_roots_to_the_others(certificates: Certificates, tmp_path: Path) -> None:
    """A CA file adds to the public roots: it does not replace them, and the default context stays as it is."""
    file = tmp_path / "ca.pem"
    certificates.ca.cert_pem.write_to_path(str(file))
    public = [root["serialNumber"] for root in tls.default_ssl_context().get_ca_certs()]
    own = certificates.client.get_ca_certs()[0]["serialNumber"]
    for context in (tls.upstream_ssl_context(str(file)), tls.system_ssl_context(str(file))):
        assert isinstance(context, ssl.SSLContext)
        assert {root["serialNumber"] for root in context.get_ca_certs()} >= {*public, own}
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert [root["serialNumber"] for root in tls.default_ssl_context().get_ca_certs()] == public


def test_the_system_context_trusts_what_the_system_trusts(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSL_CERT_FILE applies to the system context and not to the default one."""
    file = tmp_path / "ca.pem"
    certificates.ca.cert_pem.write_to_path(str(file))
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    own = certificates.client.get_ca_certs()[0]["serialNumber"]
    public = tls.default_ssl_context().get_ca_certs()
    trusted = {root["serialNumber"] for root in tls.system_ssl_context(None).get_ca_certs()}
    assert trusted >= {own, *(root["serialNumber"] for root in public)}
    assert own not in [root["serialNumber"] for root in public]


def test_a_file_that_holds_no_certificate(tmp_path: Path) -> None:
    """A missing file raises OSError, one without a certificate ssl.SSLError."""
    file = tmp_path / "ca.pem"
    for make in (tls.upstream_ssl_context, tls.system_ssl_context):
        with pytest.raises(FileNotFoundError):
            make(str(tmp_path / "missing.pem"))
        file.write_text("no certificate")
        with pytest.raises(ssl.SSLError):
            make(str(file))


# ---- connections ----------------------------------------------------------------------------------------------------


@on_both_loops
async def test_tls_with_a_trusted_certificate(certificates: Certificates) -> None:
    """The host name is sent as SNI, the certificate is verified, the connection is reused."""
    names: list[str | None] = []
    context = certificates.server("localhost")
    context.sni_callback = lambda _, name, __: names.append(name)
    async with (
        serving(always(CHUNKED + chunk(b"ab") + b"0\r\n\r\n"), tls=context) as upstream,
        transporting(ssl_context=certificates.client) as transport,
    ):
        for _ in range(3):
            request = post(upstream.url.replace("127.0.0.1", "localhost"))
            response = await transport.handle_async_request(request)
            assert (await push(response)).body == b"ab"
        assert (names, upstream.accepted) == (["localhost"], 1)


@pytest.mark.parametrize("fault", ["expired", "wrong name", "untrusted", "untrusted by certifi"])
@on_both_loops
async def test_tls_with_a_bad_certificate(fault: str, certificates: Certificates) -> None:
    """A certificate that is expired, for another name or of an unknown CA raises ConnectError with that cause."""
    ours = certificates if fault != "untrusted" else Certificates()
    expired = {"not_before": YESTERDAY - datetime.timedelta(days=9), "not_after": YESTERDAY}
    context = ours.server(
        "example.org" if fault == "wrong name" else "127.0.0.1", **(expired if fault == "expired" else {})
    )
    options = {"ssl_context": None if fault == "untrusted by certifi" else certificates.client}
    async with serving(always(EMPTY), tls=context) as upstream, transporting(**options) as transport:
        error = await failure(transport, upstream.url)
        assert type(error) is httpx.ConnectError
        assert isinstance(error.__cause__, ssl.SSLCertVerificationError)
        assert upstream.requests == []
        await settled(lambda: transport.open_sockets == upstream.open == 0)


@on_both_loops
async def test_a_reset_in_the_handshake_is_no_tls_failure(certificates: Certificates) -> None:
    """A connection that breaks in the handshake may be retried: the cause is an OSError, not an SSLError."""

    async def reset(peer: Peer) -> None:
        await peer.reader.read(1)
        peer.reset()

    async with serving(reset) as upstream, transporting(ssl_context=certificates.client) as transport:
        error = await failure(transport, upstream.url.replace("http:", "https:"))
        assert type(error) is httpx.ConnectError
        assert isinstance(error.__cause__, ConnectionError)


@on_both_loops
async def test_plain_http_behind_https_is_a_tls_failure(certificates: Certificates) -> None:
    """A server without TLS causes a ConnectError whose cause is an SSLError."""
    async with (
        serving(endless(EMPTY, b"junk")) as upstream,
        transporting(ssl_context=certificates.client) as transport,
    ):
        server = socket.create_server(("127.0.0.1", 0))
        with server:
            task = asyncio.create_task(
                failure(transport, f"https://127.0.0.1:{server.getsockname()[1]}/", connect=LIVENESS)
            )
            server.setblocking(False)
            accepted, _ = await asyncio.get_running_loop().sock_accept(server)
            with accepted:
                accepted.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                error = await task
        assert type(error) is httpx.ConnectError
        assert isinstance(error.__cause__, ssl.SSLError)
        assert upstream.accepted == 0


@pytest.mark.parametrize("notified", [True, False])
@on_both_loops
async def test_tls_until_eof_needs_the_close_notify(notified: bool, certificates: Certificates) -> None:
    """A body that ends with the connection is complete if close_notify came; an attacker can forge a bare FIN.

    asyncio's TLS reports both alike (uvloop's does not), so there a bare FIN passes, as in httpx's own transport.
    """

    async def handler(peer: Peer) -> None:
        await peer.answer(OK + b"\r\n", b"ab")
        if not notified:
            await asyncio.sleep(0.02)
            with socket.socket(fileno=os.dup(peer.writer.get_extra_info("socket").fileno())) as sock:
                sock.shutdown(socket.SHUT_WR)
            await peer.gone()

    async with (
        serving(handler, tls=certificates.server("127.0.0.1")) as upstream,
        transporting(ssl_context=certificates.client) as transport,
    ):
        recorder = await push(await transport.handle_async_request(post(upstream.url)))
        assert recorder.body == b"ab"
        if isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
            assert recorder.error is None
        else:
            assert isinstance(recorder.error, httpx.RemoteProtocolError) != notified
