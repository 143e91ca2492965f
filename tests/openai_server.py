"""A server on 127.0.0.1 that speaks OpenAI's chat completions about images, and fails in the ways that such servers do.

with OpenAI(lambda question: "<think>…</think> 5") as server:
    server.fail("second question", "status 429", "cut")      # at its first two tries, then it is answered
    server.url, server.asked, server.answered
"""

import base64
import io
import json
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

RETRY_AFTER = 0.3  # seconds


class OpenAI:
    """`reply` turns the text of a question into an answer: its text, or a message with other fields; `logprobs`, if it
    is given, turns the body of a request into what is said of each token.

    Attributes:
        asked: the text of each request that was understood, in order, with those that then failed.
        answered: the text of each request that got its whole answer.
        times: when each was asked.
        images, bodies, keys: of each, the sizes of its images, its JSON, and the header Authorization.
        busiest: the most requests at one time.
    """

    def __init__(self, reply, seconds: float = 0.0, logprobs=None):
        self.reply, self.seconds, self.logprobs = reply, seconds, logprobs
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.asked, self.answered, self.times, self.images, self.bodies, self.keys = [], [], [], [], [], []
        self.open = self.busiest = 0
        self.usage: int | None = None  # tokens of a prompt, as it says
        self.longest: int | None = None  # tokens of an answer, if not what it is asked for
        self.lock = threading.Lock()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> "OpenAI":
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, part_of_question: str, *faults: str) -> None:
        """Faults of the next requests with these words: `timeout`, `broken JSON`, `no choices`, `cut`, `reset`, `gzip`,
        which it is not, `deep`, `too much`, `no end`, or `status 429` and the like, with what it says behind a colon; a
        429 says when to come again, and a 308 where to."""
        self.faults[part_of_question] += faults

    def next_fault(self, question: str) -> str | None:
        with self.lock:
            found = next((faults for part, faults in self.faults.items() if part in question and faults), None)
            return found.pop(0) if found else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:
        """A client may hang up, or be killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: OpenAI

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self.error(404, f"no {self.path} here")
        question, images = _read(body["messages"])
        owner = self.owner
        with owner.lock:
            owner.asked.append(question)
            owner.times.append(time.monotonic())
            owner.images.append(images)
            owner.bodies.append(body)
            owner.keys.append(self.headers.get("Authorization"))
            owner.open += 1
            owner.busiest = max(owner.busiest, owner.open)
        try:
            time.sleep(owner.seconds)
            self.answer(question, body, owner.next_fault(question))
        finally:
            with owner.lock:
                owner.open -= 1

    def cut_at(self, body: dict) -> int:
        return body["max_tokens"] if self.owner.longest is None else self.owner.longest

    def answer(self, question: str, body: dict, fault: str | None) -> None:
        said = self.owner.reply(question)
        message = {"role": "assistant", **(said if isinstance(said, dict) else {"content": said})}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        if self.owner.logprobs:
            choice["logprobs"] = {"content": self.owner.logprobs(body)}
            if len(choice["logprobs"]["content"] or ()) == self.cut_at(body):
                choice["finish_reason"] = "length"
        whole = {"object": "chat.completion", "choices": [choice]}
        if self.owner.usage is not None:
            whole["usage"] = {"prompt_tokens": self.owner.usage}
        content = json.dumps(whole).encode()
        if fault is None:
            with self.owner.lock:
                self.owner.answered.append(question)
            self.send(200, content)
        elif fault == "timeout":
            time.sleep(1.5)
        elif fault == "broken JSON":
            self.send(200, content[: len(content) // 2])
        elif fault == "no choices":
            self.send(200, b'{"object": "chat.completion", "choices": []}')
        elif fault == "gzip":
            self.send(200, content, {"Content-Encoding": "gzip"})
        elif fault == "deep":
            self.send(200, b"[" * 100_000)
        elif fault == "too much":
            self.send(200, b" " * 2**21)
        elif fault == "no end":
            self.send(200, b" ", length=10**6)
            for _ in range(15):  # never silent for long
                time.sleep(0.1)
                self.wfile.write(b" ")
            self.close_connection = True
        elif fault == "cut":
            self.send(200, content[: len(content) // 2], length=len(content))
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            status, _, said = fault.removeprefix("status ").partition(": ")
            self.error(int(status), said or "of the test's server")

    def error(self, status: int, message: str) -> None:
        headers = {429: {"Retry-After": str(RETRY_AFTER)}, 308: {"Location": "https://127.0.0.1/v1"}}.get(status)
        self.send(status, json.dumps({"error": {"message": message}}).encode(), headers)

    def send(self, status: int, content: bytes, headers: dict | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


def _read(messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """The text of the parts, and the sizes of the images, which have to be whole."""
    texts, sizes = [], []
    for part in (part for message in messages for part in message["content"]):
        if part["type"] == "text":
            texts.append(part["text"])
            continue
        head, _, data = part["image_url"]["url"].partition(",")
        assert re.fullmatch(r"data:image/\w+;base64", head)
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            image.load()
            sizes.append(image.size)
    return "".join(texts), sizes
