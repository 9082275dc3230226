"""Images of requests: data URLs, and addresses on the net if the operator has them fetched."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse
from collections.abc import Iterator

from mmjax.serve.errors import ApiError
from mmjax.vision import Image, ImageError, read_image

# Seconds for a whole fetch, redirects included; and how many of these are followed.
_DEADLINE, _REDIRECTS = 15.0, 3
_PORTS = {"http": 80, "https": 443}
_FIELD = "messages"

type _Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Where images of requests may come from.

    Attributes:
      remote: Whether http and https addresses are fetched. Only public ones are, on their usual
        ports, redirects included: a request must not make this server knock on its neighbours'
        doors.
      max_bytes: Of an image file.
    """

    remote: bool = False
    max_bytes: int = 20 * 2**20

    def read(self, url: str) -> Image:
        """The image behind a URL of a request.

        Raises:
          ApiError: it cannot be had, or is no image.
        """
        scheme = url[: url.find(":")].lower() if ":" in url[:8] else ""
        if scheme == "data":
            data = _data(url)
        elif scheme in _PORTS:
            if not self.remote:
                told = "this server fetches no images; send them as data URLs"
                raise _wrong(f"{told}, or start it with --allow-remote-images")
            data = self._fetch(url)
        else:
            raise _wrong(f"an image's url must begin with data:, http: or https:, got {url[:40]!r}")
        if len(data) > self.max_bytes:
            raise _wrong(f"the image has {len(data)} bytes, at most {self.max_bytes} are taken")
        try:
            return read_image(data)
        except ImageError as error:
            raise _wrong(str(error)) from None

    def _fetch(self, url: str) -> bytes:
        end = time.monotonic() + _DEADLINE
        for _ in range(1 + _REDIRECTS):
            try:
                with _answer(url, end) as (answer, connection):
                    if answer.status in (301, 302, 303, 307, 308):
                        url = urllib.parse.urljoin(url, answer.headers.get("Location", ""))
                        continue
                    if answer.status != 200:
                        raise _wrong(f"the image's server answered {answer.status}")
                    return _body(answer, connection, self.max_bytes, end)
            except (OSError, http.client.HTTPException) as error:
                raise _wrong(f"the image cannot be fetched: {type(error).__name__}") from None
        raise _wrong(f"the image is behind more than {_REDIRECTS} redirects")


def _data(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise _wrong("an image's data URL must read data:image/...;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _wrong(f"an image's data URL is no base64: {error}") from None


@contextlib.contextmanager
def _answer(
    url: str, end: float
) -> Iterator[tuple[http.client.HTTPResponse, http.client.HTTPConnection]]:
    """The head of the answer of a public server."""
    host, port, path, tls = _parts(url)
    address = _public_address(host, port)
    # The address that was checked is the one that is called: a second look-up of the name could
    # give another.
    raw = socket.create_connection((str(address), port), timeout=_left(end))
    connection = http.client.HTTPConnection(host, port)
    try:
        if tls:
            raw = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
        connection.sock = raw
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "mmjax"})
        yield connection.getresponse(), connection
    finally:
        connection.close()
        raw.close()


def _parts(url: str) -> tuple[str, int, str, bool]:
    """Host, port, path and whether it is https."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
        host = None if host is None else host.encode("idna").decode()
    except (ValueError, UnicodeError):
        raise _wrong(f"{url[:80]!r} is no address of an image") from None
    if parts.scheme not in _PORTS or not host:
        raise _wrong(f"{url[:80]!r} is no address of an image")
    usual = _PORTS[parts.scheme]
    if port not in (None, usual) or parts.username is not None:
        raise _wrong("an image's address may name neither a port of its own nor a user")
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?")
    return host, usual, f"{path}?{query}" if query else path, parts.scheme == "https"


def _public_address(host: str, port: int) -> _Address:
    """One address of the host, once all of them are found public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise _wrong("the image's address is not a public one")
    return addresses[0]


def is_public(address: _Address) -> bool:
    """Whether an address is anyone's on the net; one wrapped in another counts as itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        wrapped = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            wrapped.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(inner is not None and not is_public(inner) for inner in wrapped):
            return False
        if address.ipv4_mapped is not None:
            return True
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not address.is_private
    )


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _body(
    answer: http.client.HTTPResponse,
    connection: http.client.HTTPConnection,
    most: int,
    end: float,
) -> bytes:
    """The body, as long as it keeps within size and time."""
    told = f"the image has more than {most} bytes"
    if (answer.length or 0) > most:
        raise _wrong(told)
    parts: list[bytes] = []
    size = 0
    while True:
        # One that sends a byte now and then would never time out by itself.
        if connection.sock is not None:
            connection.sock.settimeout(_left(end))
        part = answer.read1(1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > most:
            raise _wrong(told)
        _left(end)


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise _wrong(f"the image took longer than {_DEADLINE:g} s")
    return left


def _wrong(told: str) -> ApiError:
    return ApiError(400, told, param=_FIELD, code="invalid_image")
