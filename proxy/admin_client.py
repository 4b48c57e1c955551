"""The operators' API of a running server as Python calls: what `vramp status`, `models`, `load` and `unload` speak.

Standard library only for the wire: a command that lives for 50 ms has no use for an event loop.
"""

from __future__ import annotations

import http.client
import os
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Final, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from proxy.config_secrets import fits_header

T = TypeVar("T")
TIMEOUT_S: Final = 10.0
# a load is silent while weights are read; the server's own start timeout ends it long before
LOAD_TIMEOUT_S: Final = 3600.0


class AdminError(Exception):
    """The server could not be asked, or refused; the message has the remedy. `exit_code` is the command's."""

    exit_code = 1


class UnreachableError(AdminError):
    """No server at the address."""

    exit_code = 3


class Unreadable(msgspec.Struct, frozen=True):
    """A device cannot be read: for how long, and why."""

    for_s: float
    why: str


class DeviceStatus(msgspec.Struct, frozen=True):
    """One device, in bytes. `used` is measured, `held` is what the ledger counts for engines, loads included. While it
    is `unreadable` these are the figures of its last reading."""

    name: str
    kind: str = ""
    capacity_bytes: int = 0
    used_bytes: int = 0
    held_bytes: int = 0
    reserved_bytes: int = 0
    foreign_bytes: int = 0
    free_bytes: int = 0
    unreadable: Unreadable | None = None


class ModelStatus(msgspec.Struct, frozen=True):
    """One model and its engine. `progress` is 0 to 1 while it loads."""

    id: str
    backend: str = ""
    device: str | None = None
    state: str = ""
    note: str | None = None
    progress: float | None = None
    memory_bytes: int | None = None
    measured_bytes: int | None = None
    pinned: bool = False
    in_flight: int = 0
    waiting: int = 0
    eta_s: float | None = None
    last_used_s: float | None = None
    loads: int = 0
    task: str = ""


class Waiting(msgspec.Struct, frozen=True, rename={"latency_class": "class"}):
    """Requests of one latency class that wait."""

    latency_class: str
    count: int


class QueueStatus(msgspec.Struct, frozen=True, rename={"latency_class": "class"}):
    """Requests of one tenant that wait for one model in one latency class."""

    model: str
    latency_class: str
    tenant: str
    count: int


class DecisionStatus(msgspec.Struct, frozen=True):
    """What the scheduler did and why; `t_s` on the server's clock, whose present is `uptime_s`."""

    t_s: float
    what: str
    why: str


class WorkerStatus(msgspec.Struct, frozen=True):
    """One of several processes that serve clients. `serving`: it has begun to."""

    pid: int
    serving: bool = True
    in_flight: int = 0


class Status(msgspec.Struct, frozen=True):
    """The whole of GET /admin/api/status. Keys that we do not know are a newer server's, and ignored."""

    version: str = ""
    backend: str = ""
    uptime_s: float = 0.0
    config: str = ""
    devices: tuple[DeviceStatus, ...] = ()
    models: tuple[ModelStatus, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    queues: tuple[QueueStatus, ...] = ()
    decisions: tuple[DecisionStatus, ...] = ()
    workers: tuple[WorkerStatus, ...] = ()
    worker_restarts: int | None = None  # None where the proxy serves by itself


class Step(msgspec.Struct, frozen=True):
    """One line of a load or unload: where it stands, and at last `done`, perhaps with an `error`."""

    state: str = ""
    progress: float | None = None
    note: str | None = None
    done: bool = False
    error: str | None = None


class _Inner(msgspec.Struct):
    message: str
    code: str | int | None = None


class _Envelope(msgspec.Struct):
    error: _Inner | str


class AdminClient:
    """Speaks to one server. A connection per call: there are few, and none outlives its command."""

    def __init__(self, address: str, key: str | None = None) -> None:
        """`address` is HOST:PORT or a URL. Raises AdminError if it is neither."""
        parts = urlsplit(address if "//" in address else f"http://{address}")
        try:
            self.host, self.port = parts.hostname or "", parts.port
        except ValueError:
            self.host, self.port = "", None
        if parts.scheme not in ("http", "https") or not self.host:
            raise AdminError(f"{address} is no address of a server; use HOST:PORT or http://HOST:PORT")
        self.address = parts.netloc.rpartition("@")[2]
        self._tls = parts.scheme == "https"
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def get(self, path: str) -> bytes:
        """The JSON at /admin/api/`path`."""
        with self._answer("GET", path, TIMEOUT_S) as response:
            return response.read()

    def status(self) -> Status:
        """Devices, models, queues and decisions."""
        return self._decode(self.get("status"), Status)

    def change(self, model: str, action: str) -> Iterator[Step]:
        """Loads or unloads a model, step by step. Raises AdminError where it fails, also in the middle."""
        with self._answer("POST", f"models/{quote(model, safe='')}/{action}", LOAD_TIMEOUT_S) as response:
            for line in response:
                step = self._decode(line, Step)
                if step.error:
                    raise AdminError(f"{action} of {model} failed: {step.error}")
                yield step
                if step.done:
                    return
        raise AdminError(f"the server ended the {action} of {model} without a result; see vramp status")

    @contextmanager
    def _answer(self, method: str, path: str, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
        """An answer of status 200, for as long as it is read. Raises AdminError for every other and for none."""
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        with (
            closing(kind(self.host, self.port, timeout=timeout_s)) as connection,
            # closed by itself: a connection forgets a response that lasts until its end
            closing(self._response(connection, method, path)) as response,
        ):
            if response.status != http.client.OK:
                raise self._refusal(response)
            try:
                yield response
            except (OSError, http.client.HTTPException) as error:
                raise AdminError(f"the connection to {self.address} broke ({error}); see vramp status") from None

    def _response(self, connection: http.client.HTTPConnection, method: str, path: str) -> http.client.HTTPResponse:
        try:
            connection.request(method, f"{self._prefix}/admin/api/{path}", headers=self._headers)
            return connection.getresponse()
        except OSError as error:
            raise self._unreachable(error) from None
        except http.client.HTTPException:
            raise AdminError(f"what listens on {self.address} is not a vramp; name its admin_listen") from None

    def _unreachable(self, error: Exception) -> AdminError:
        if isinstance(error, TimeoutError):
            return AdminError(f"{self.address} does not answer; see the server's log")
        if isinstance(error, ssl.SSLError):
            why = getattr(error, "verify_message", None) or error.reason or error
            return AdminError(f"no TLS with {self.address} ({why}); vramp's own admin_listen has none: use http://")
        return UnreachableError(
            f"nothing listens on {self.address} ({getattr(error, 'strerror', None) or error}); start it with "
            "`vramp serve`, or name another address with --admin or VRAMP_ADMIN"
        )

    def _refusal(self, response: http.client.HTTPResponse) -> AdminError:
        if response.status == http.client.UNAUTHORIZED:
            return AdminError(f"{self.address} wants an operator's key; set VRAMP_ADMIN_KEY to one of its admin_keys")
        try:
            error = msgspec.json.decode(response.read(), type=_Envelope).error
            if isinstance(error, _Inner) and error.code == "not_found":
                return AdminError(
                    f"{self.address} is where clients connect; name the server's admin_listen with --admin"
                )
        except (msgspec.DecodeError, OSError, http.client.HTTPException):
            return AdminError(
                f"{self.address} answered {response.status}, not as vramp's operators' API does; name its admin_listen"
            )
        return AdminError(error if isinstance(error, str) else error.message)

    def _decode(self, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.DecodeError:
            raise AdminError(
                f"{self.address} does not answer as vramp's operators' API does; name its admin_listen"
            ) from None


def operator_key() -> str | None:
    """The key for the operators' API, from VRAMP_ADMIN_KEY: an option would be seen in the list of processes."""
    key = os.environ.get("VRAMP_ADMIN_KEY", "").strip()
    if not fits_header(key):
        raise AdminError("VRAMP_ADMIN_KEY has characters that no header can carry; use printable ASCII")
    return key or None
