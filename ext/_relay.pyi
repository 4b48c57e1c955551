"""The protocol between the relay and Python. Theory: `_relay.pyx`. Spans are in seconds."""

from collections.abc import Iterable
from ssl import SSLContext
from typing import Any, Protocol

from ext._gate import Gate
from ext.body_scan import Spans
from ext.rate_counters import Grant
from ext.sse import EventScanner

Lease = tuple[Pool, bytes, int, str]  # where to, the request's head without its length, and what Python wants besides

class Exchange(Protocol):
    """One request that was decided. After `whole`, `ended` or `failed` nothing else is called."""

    def scan(self, headers: dict[str, str]) -> EventScanner:
        """The answer is an event stream: what each piece of it goes through."""

    def begin(self, events: bytes) -> tuple[bytes, bool]:
        """The first events: (what goes out as it is, whether it has output, so that the rest needs no Python)."""

    def large(self, status: int, headers: dict[str, str], length: int) -> bytes:
        """The answer is too large to be held: its head. `length` is -1 where it will be chunked."""

    def whole(self, status: int, headers: dict[str, str], body: bytes) -> bytes | None:
        """The answer is complete and nothing of it is out: all that the client gets, or None to hand it over."""

    def ended(self, tail: bytes) -> bytes | None:
        """An answer that was begun is complete: its last bytes as they are. None ends it as a failure does."""

    def failed(self, kind: int, words: str) -> bytes | None:
        """The last bytes; None where nothing can be said: hand over what has not begun, cut off what has."""

class Owner(Protocol):
    """Who decides."""

    def decide(self, client: Client) -> Exchange | None:
        """The exchange of a whole request, after `client.forward`; None to hand it over. Never waits."""

    def lease(self, client: Client, origin: Any) -> Lease | None:
        """A lease for a request by a flow that has no pool; None where there is none at once. Never waits."""

    def give_back(self, lease: Lease, prompt_tokens: int | None, output_tokens: int) -> None:
        """The request of that lease was answered and used so much; None: nobody knows."""

    def resume(self, client: Client) -> Exchange:
        """The exchange of a request that went by `client.flow`: something is to be asked of it."""

    def date(self) -> bytes:
        """The last line of a head, its date, and the empty line."""

    def hand_over(self, fd: int, data: bytes, exchange: Exchange | None, remote: str, whole: bool) -> None:
        """Go on with this connection: its descriptor, what has been read of it, the exchange that failed on it, the
        client's address. Where the client speaks TLS, the descriptor is of a socket pair, and what is plain is there.
        `whole`: what was read is one request and nothing else.
        """

    def refuse_bare(self, fd: int, remote: str) -> None:
        """Tell this client, who spoke plain HTTP where TLS is spoken, to use TLS. Its descriptor is the owner's now."""

    def bug(self, exchange: Exchange | None) -> None:
        """Called in an `except` block: an error of ours ended this exchange and its connections."""

class Pool:
    """The idle connections to one numeric address.

    With a `tls` context they speak TLS to it, and its certificate is to be for `name`.
    """

    def __init__(
        self, host: str, port: int, keepalive_s: float, tls: SSLContext | None = None, name: str = ""
    ) -> None: ...
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def idle(self) -> int: ...

class Flow:
    """Where requests of one kind go. `origin` is whatever Python needs to go on with one of them.

    `head` is that of the request upstream, without its length. `changes` are (which member of the body, its new value):
    0 `model`, 1 `stream_options`, 2 `priority`, -1 what is put before the first. `stream_lines` are what every stream's
    head has after its content type. It is good until `until_s` on the relay's clock. Without a `pool` each request
    needs an `Owner.lease`.
    """

    def __init__(
        self,
        origin: object,
        gate: Gate,
        pool: Pool | None,
        head: bytes,
        changes: list[tuple[int, bytes]],
        limits: Limits,
        *,
        stream_lines: bytes,
        withhold_usage: bool,
        until_s: float,
    ) -> None: ...
    @property
    def origin(self) -> Any: ...

class Limits:
    """Limits of the waits of an exchange, in seconds."""

    def __init__(
        self, *, connect_s: float, first_byte_s: float, idle_s: float, total_s: float, stall_s: float
    ) -> None: ...

class Client:
    """A client's connection with a request on it."""

    @property
    def path(self) -> str: ...
    @property
    def headers(self) -> dict[str, str]: ...
    @property
    def remote(self) -> str: ...
    @property
    def body_size(self) -> int: ...
    @property
    def body(self) -> bytes: ...
    @property
    def started(self) -> bool: ...
    @property
    def bytes_out(self) -> int:
        """Bytes of the answer's body that went without asking."""
    @property
    def first_byte_s(self) -> float: ...
    def scan(self) -> bool:
        """Scan the body (`ext.body_scan`); False where it is not ordinary, or it or the head is too large."""
    @property
    def short(self) -> bytes:
        """The body's short form. After `scan`."""
    @property
    def spans(self) -> Spans:
        """Where in the body the members are that may be spliced. After `scan`."""
    @property
    def memo(self) -> Any:
        """After `scan`: what was remembered for a request that said the same, but for its messages; else None.

        The same path, the same kept headers and the same short form, byte for byte.
        """
    def remember(self, memo: object, flow: Flow | None = None) -> None:
        """Keep this as `memo` for requests that say the same, on whichever connection; they go by the flow."""
    @property
    def flow(self) -> Flow | None:
        """The flow that the request goes by; the rest is known of such a request only."""
    @property
    def request_id(self) -> str: ...
    @property
    def began_s(self) -> float: ...
    @property
    def lease(self) -> Lease | None: ...
    def take_grant(self) -> Grant | None:
        """What was reserved for it; to be settled by whoever takes it."""
    @property
    def scanner(self) -> EventScanner | None: ...
    @property
    def passed(self) -> dict[str, str]:
        """The headers of its answer that are passed on."""
    @property
    def output_s(self) -> float:
        """When its stream's first output went out, on the relay's clock; 0 before."""
    @property
    def first_bytes_out(self) -> int:
        """How many bytes of the body that was."""
    def forward(self, pool: Pool, head: bytes, edits: list[tuple[int, int, bytes]], limits: Limits) -> None:
        """Send the request when `decide` returns: this head, the body's length, the body.

        `edits` of the body, in order: (start, end, new bytes).
        """

class Listener:
    """A listening socket of a relay."""

    def accept(self, most: int) -> int:
        """Take connections that are there; how many there were, `most` at most, or -1 if there is no descriptor for
        one. For a listener that is not watched."""

class Relay:
    """The relay. `kept` are the headers that `Client.headers` has, `foreign` beginnings of those that are not taken."""

    def __init__(
        self,
        owner: Owner,
        *,
        paths: Iterable[str],
        kept: Iterable[str],
        foreign: Iterable[str],
        passed: Iterable[str],
        passed_families: Iterable[str],
        keepalive_s: float,
        stall_s: float,
        handshake_s: float,
    ) -> None:
        """Of clients that speak TLS: `stall_s` is how long one may take nothing after it was handed over."""
    passing: bool
    """Whether requests go by flows; if not, as at first, Python is asked about each."""
    @property
    def now_s(self) -> float: ...
    @property
    def connections(self) -> int: ...
    def bound(self, max_head: int, max_body: int, max_depth: int) -> None:
        """What is larger, in bytes, or whose body is nested deeper, is not taken."""
    def forget_flows(self) -> None:
        """No request goes by a flow that there is now; those under way go on."""
    def fileno(self) -> int: ...
    def listen(self, fd: int, watched: bool = True, tls: SSLContext | None = None) -> Listener: ...
    def take_back(self, fd: int, data: bytes, remote: str) -> None:
        """Go on with a connection that was handed over, from the start of a request, of which `data` was read."""
    def stop_listening(self) -> None: ...
    def pump(self) -> None: ...
    def tick(self) -> None: ...
    def cut_off(self) -> None: ...
    def close(self) -> None: ...
