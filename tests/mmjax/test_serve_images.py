"""Images in requests: data URLs, and addresses that must not lead into this server's own net."""

import base64
import http.server
import io
import ipaddress
import json
import socket
import threading

import PIL.Image
import pytest

from mmjax.engine import ImagePrompt
from mmjax.serve import Served
from mmjax.serve import images as served_images
from mmjax.serve.errors import ApiError
from mmjax.serve.images import ImageSource, is_public
from mmjax.serve.jobs import chat_job
from mmjax.vision import VisionConfig
from tests.mmjax.serving import byte_tokenizer

VISION = VisionConfig(hidden_size=8, num_heads=1, image_size=28, patch_size=7, image_token_id=258)


def png(size=(30, 20), colour=(255, 0, 0)):
    stream = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def data_url(data=None, kind="png"):
    data = png() if data is None else data
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def served(vision=VISION, **changes):
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_special_tokens(["<image>"])
    assert tokenizer.backend.token_to_id("<image>") == VISION.image_token_id
    return Served("tiny", tokenizer, 2000, vision, ImageSource(**changes))


def body(*content):

    return json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    ).encode()


def item(url, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(words):
    return {"type": "text", "text": words}


def test_images_of_a_chat_become_a_prompt():
    blue = data_url(png((60, 60), (0, 0, 255)))
    job = chat_job(
        body(text("a"), item(data_url()), text("b"), item(blue, detail="auto")), served()
    )
    (prompt,) = job.prompts
    assert isinstance(prompt, ImagePrompt)
    words = served().tokenizer.decode(prompt.prompt)
    assert "name=user\na<image>b<image>" in words
    assert [i.size for i in prompt.images] == [(20, 30), (60, 60)]
    assert prompt.images[1].pixels[0, 0].tolist() == [0, 0, 255]
    # Thumbnails of 16 features each, and what the images take beside them.
    assert job.params.max_tokens < 2000 - len(prompt.prompt) - 2 * 15


def refused(*content, source=None, **changes):
    with pytest.raises(ApiError) as caught:
        chat_job(body(*content), source or served(**changes))
    assert caught.value.status == 400
    return str(caught.value)


def test_what_is_no_image_is_refused():
    assert "no known format" in refused(item(data_url(b"not an image")))
    assert "is broken" in refused(item(data_url(png()[:50])))
    assert "is no base64" in refused(item("data:image/png;base64,%%%"))
    assert "must read data:image/...;base64" in refused(item("data:image/png,abc"))
    assert "must begin with data:, http: or https:" in refused(item("file:///etc/passwd"))
    assert "must begin with data:, http: or https:" in refused(item("/etc/passwd"))
    assert "has 83 bytes, at most 10" in refused(item(data_url(bytes(83))), max_bytes=10)
    assert "takes no images" in refused(item(data_url()), source=served(vision=None))
    assert "65 images are more than the 64" in refused(*[item(data_url())] * 65)
    assert "detail" in refused(item(data_url(), detail="low"))
    assert "messages[0].content[0]" in refused({"type": "image_url", "image_url": "x"})


def test_a_prompt_that_images_make_too_long():
    assert "the prompt has" in refused(*[item(data_url(png((300, 300))))] * 20)


def test_images_belong_to_users():

    message = {"role": "system", "content": [item(data_url())]}
    data = json.dumps({"model": "tiny", "messages": [message]}).encode()
    with pytest.raises(ApiError, match="messages"):
        chat_job(data, served())


# Addresses -------------------------------------------------------------------------------------


def test_remote_images_are_refused_unless_they_are_allowed():
    assert "fetches no images" in refused(item("http://example.com/a.png"))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)
def test_addresses_of_this_net(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8"])
def test_addresses_of_the_net(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://127.0.0.1/a.png", "is not a public one"),
        ("http://localhost/a.png", "is not a public one"),
        ("http://2130706433/a.png", "is not a public one"),
        ("http://0x7f.1/a.png", "is not a public one"),
        ("http://[::1]/a.png", "is not a public one"),
        ("http://[::ffff:169.254.169.254]/a.png", "is not a public one"),
        ("http://127.0.0.1:22/a.png", "neither a port of its own nor a user"),
        ("http://me:pw@example.com/a.png", "neither a port of its own nor a user"),
        ("http:///a.png", "is no address of an image"),
        ("http://[/a.png", "is no address of an image"),
        ("https://exa mple/a\r\nHost: b", "(no address of|cannot be fetched)"),
    ],
)
def test_addresses_that_are_not_fetched(url, told):
    with pytest.raises(ApiError, match=told):
        ImageSource(remote=True).read(url)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        where = self.path.partition("?")[0]
        if where == "/image":
            self.answer(200, png())
        elif where == "/endless":
            self.send_response(200)
            self.end_headers()
            while True:
                try:
                    self.wfile.write(bytes(1 << 16))
                except OSError:
                    return
        elif where == "/inside":
            self.answer(302, b"", Location="http://169.254.169.254/latest/meta-data")
        elif where == "/loop":
            self.answer(302, b"", Location="/loop")
        elif where == "/once":
            self.answer(301, b"", Location="/image?size=big")
        else:
            self.answer(404, b"nothing")

    def answer(self, status, data, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def outside(monkeypatch):
    """A server that the name pictures.example leads to, as if it were out on the net."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    public = "93.184.216.34"
    looked_up = []

    def resolve(host, port, *_, **__):
        looked_up.append(host)
        address = public if host == "pictures.example" else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    connect = socket.create_connection

    def called(address, timeout):
        assert address == (public, 80)  # What was checked, not the name.
        return connect(server.server_address, timeout)

    monkeypatch.setattr(served_images.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(served_images.socket, "create_connection", called)
    yield looked_up
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(path, **changes):
    return ImageSource(remote=True, **changes).read(f"http://pictures.example{path}")


def test_remote_image(outside):
    assert fetch("/image").size == (20, 30)
    assert fetch("/once").size == (20, 30)
    assert [host for host in outside if host != "127.0.0.1"] == ["pictures.example"] * 3


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/inside", "is not a public one"),
        ("/loop", "behind more than 3 redirects"),
        ("/missing", "server answered 404"),
        ("/endless", "has more than 1000000 bytes"),
    ],
)
def test_remote_image_that_is_not_taken(outside, path, told):
    with pytest.raises(ApiError, match=told):
        fetch(path, max_bytes=10**6)


def test_remote_image_that_takes_too_long(outside, monkeypatch):
    monkeypatch.setattr(served_images, "_DEADLINE", 0.0)
    with pytest.raises(ApiError, match="took longer than 0 s"):
        fetch("/image")
