"""Clients of a server that all ask at once, and how long each of them waited."""

from __future__ import annotations

import base64
import http.client
import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from hart_runtime.common.errors import InputError, parameter

DRAWN, BUSY, OTHER = "drawn", "429", "other bytes"
PATIENCE = 660
"""Seconds until a client gives up."""
SHARES = (50, 90, 99)


Wanted = tuple[str, int]
"""A prompt and a seed."""


@dataclass(frozen=True)
class Load:
    """What clients ask for, and how often."""

    url: str
    clients: int = 4
    """That ask again as soon as they are answered; with ``moments``, how many wait at the most."""
    moments: Sequence[float] = ()
    """At which requests come, in seconds, whether others are answered or not; none: every client waits for
    its own."""
    seconds: float = 30.0
    prompts: Sequence[str] = ()
    """In turns; one at least."""
    pictures: int = 1
    """Of a request."""
    partials: int = 1
    """Views of each picture before it is done."""
    key: str | None = None
    wanted: Mapping[Wanted, bytes] = field(default_factory=dict)
    """What pictures should be, by prompt and seed; seeds are those that there are. Empty: nobody looks."""


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    outcome: str
    """DRAWN, OTHER where a picture is not what it should be, a status, or what happened to the connection."""
    first: float | None = None
    """Seconds until the first view of a picture."""
    whole: float | None = None
    """Seconds until the last picture."""
    came: float = 0.0
    """Seconds from the beginning of the load until it was asked."""


@dataclass
class Measured:
    """Everything that was answered."""

    load: Load
    seconds: float
    answers: list[Answer] = field(default_factory=list)

    @property
    def pictures(self) -> int:
        return sum(a.outcome == DRAWN for a in self.answers) * self.load.pictures

    @property
    def throughput(self) -> float:
        """Pictures a second."""
        return self.pictures / self.seconds

    @property
    def outcomes(self) -> dict[str, int]:
        return dict(Counter(answer.outcome for answer in self.answers))

    def quantiles(self, name: str) -> dict[int, float]:
        """Of "first" or "whole", by the share of requests that took no longer; empty without any."""
        values = [v for v in (getattr(answer, name) for answer in self.answers) if v is not None]
        if len(values) < 2:
            return dict.fromkeys(SHARES, values[0]) if values else {}
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        return {share: cuts[share - 1] for share in SHARES}

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "seconds": self.seconds,
            "pictures_per_second": self.throughput,
            "outcomes": self.outcomes,
            **{name: self.quantiles(name) for name in ("first", "whole")},
        }


def measure_load(load: Load) -> Measured:
    """Ask for as long as the load says, and wait for what was asked.

    Raises:
        InputError: the address is none, or nobody is there.
    """
    place = urlsplit(load.url)
    if place.scheme != "http" or place.hostname is None:
        raise InputError(f"{parameter('url', load.url)}: expected an address such as http://127.0.0.1:8000")
    try:
        _connection(load).connect()
    except OSError as error:
        raise InputError(f"{parameter('url', load.url)}: nobody answers there ({error})") from None
    answers: list[Answer] = []
    began = time.perf_counter()
    ask = _arrivals if load.moments else _client
    threads = [
        threading.Thread(target=ask, args=(load, number, began, answers)) for number in range(load.clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Measured(load, time.perf_counter() - began, answers)


def _client(load: Load, number: int, began: float, answers: list[Answer]) -> None:
    """One that asks again when it is answered, and waits as it is told to."""
    asked = 0
    while time.perf_counter() - began < load.seconds:
        now = time.perf_counter()
        answer, pause = _ask(load, number + asked * load.clients, now)
        answers.append(replace(answer, came=now - began))
        asked += 1
        time.sleep(min(pause, max(load.seconds - (time.perf_counter() - began), 0)))


def _arrivals(load: Load, number: int, began: float, answers: list[Answer]) -> None:
    """Every so many-th of the requests that come at their moments; one that begins late has waited, too."""
    for asked in range(number, len(load.moments), load.clients):
        moment = load.moments[asked]
        time.sleep(max(began + moment - time.perf_counter(), 0))
        answer, _ = _ask(load, asked, began + moment)
        answers.append(replace(answer, came=moment))


def _ask(load: Load, number: int, since: float) -> tuple[Answer, float]:
    """One request, and the seconds that the server wants its client to wait before the next."""
    prompt = load.prompts[number % len(load.prompts)]
    seed = number * load.pictures
    if load.wanted:
        seed %= sum(asked == prompt for asked, _ in load.wanted) - load.pictures + 1
    body = {
        "prompt": prompt,
        "n": load.pictures,
        "seed": seed,
        "stream": True,
        "partial_images": load.partials,
    }
    headers = {"Content-Type": "application/json"}
    if load.key:
        headers["Authorization"] = f"Bearer {load.key}"
    connection = _connection(load)
    try:
        path = urlsplit(load.url).path.rstrip("/")
        connection.request("POST", f"{path}/v1/images/generations", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            response.read()
            return Answer(str(response.status)), float(response.headers.get("Retry-After", 0))
        return _read(response, load, prompt, since), 0.0
    except (OSError, http.client.HTTPException) as error:
        return Answer(type(error).__name__), 0.0
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse, load: Load, prompt: str, since: float) -> Answer:
    """Follow a stream to its end."""
    first, left, outcome = None, load.pictures, DRAWN
    for line in response:
        if not line.startswith(b"data: "):
            continue
        now = time.perf_counter() - since
        first = now if first is None else first
        if line.startswith(b'data: {"error"'):
            return Answer("error in the stream", first)
        if b"image_generation.completed" in line[:80]:
            left -= 1
            if load.wanted:
                event = json.loads(line[6:])
                same = base64.b64decode(event["b64_json"]) == load.wanted[prompt, event["seed"]]
                outcome = outcome if same else OTHER
        if not left:
            return Answer(outcome, first, now)
    return Answer("cut off", first)


def _connection(load: Load) -> http.client.HTTPConnection:
    place = urlsplit(load.url)
    return http.client.HTTPConnection(place.hostname or "", place.port, timeout=PATIENCE)
