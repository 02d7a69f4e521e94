"""One HTTP/2 connection of the `h2` edge.

h2 judges what comes in: header blocks, settings, the order and state of streams. What goes out is written here, and so
are flow-control windows, pings and goodbyes handled here, since those are per token or need to go on where h2 would end
the connection. Rule: a fault of one stream ends that stream; a fault of the connection ends all of its streams with a
GOAWAY that names it, and no other connection notices.

Deadlines are looked at by the edge's one coarse timer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from typing import Final, cast

from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, RemoteSettingsChanged, RequestReceived, StreamEnded, StreamReset
from h2.exceptions import FlowControlError, FrameTooLargeError, ProtocolError
from h2.settings import SettingCodes

from router.errors import LOGGED_CHARS, cut
from router.ingress import h2_frames
from router.ingress.gate import CREDENTIALS
from router.ingress.grpc_port import peer_name, speaks_h2
from router.ingress.grpc_requests import FORWARDED
from router.ingress.h2_call import H2Call
from router.ingress.h2_frames import HEAD_BYTES, MAX_WINDOW
from router.ingress.h2_guard import Guard
from router.ingress.h2_headers import TABLE_EMPTIED, Head, Refusal, malformed, read_head
from router.ingress.h2_intake import Intake
from router.ingress.h2_judge import Judge, Malformed
from router.ingress.h2_site import Site
from router.ingress.h2_wire import Wire
from router.lane.carriers import tune

log = logging.getLogger(__name__)

HANDSHAKE_S: Final = 10.0
"""Until a new connection has said that it speaks HTTP/2."""
LAST_CALL_S: Final = 1.0
"""How long a client may take to learn that it shall make its calls elsewhere."""
CLOSE_S: Final = 5.0
"""How long a client may be silent while it has the last words to read."""
TLS_CLOSE_S: Final = 2.0
"""The same over TLS, where there is no end that clients would answer by theirs."""
GOODBYE_S: Final = 2.0
"""How long a client that broke the protocol may go on sending, unheard: a socket closed before that resets the
connection, and the client may never read why. As all deadlines, it is noticed up to one sweep late."""
UNHEARD_BYTES: Final = 4 << 20
"""What is read of a client that has its last words, and thrown away: about what a window lets it have under way."""

_HELD_MESSAGES: Final = 8  # How many of the largest messages one connection's requests may hold unread.
_KEPT_MESSAGES: Final = (
    8  # And how many of these its running calls may have got from compressed ones, which cost little.
)
_UNREAD_STREAMS: Final = 16  # How many full buffers of answers one connection may leave unread in all.
_STINGY_BYTES: Final = 64  # Windows that open by less make us send frame after frame of next to nothing.
_WANTED: Final = frozenset(name.encode() for name in (*FORWARDED, *CREDENTIALS))
_QUOTED: Final = re.compile(r" b['\"]")
"""Where h2 begins to quote a client's header, whose value may be a key."""
_PING: Final = b"kvlane\0\0"


class Connection(asyncio.Protocol):
    """The asyncio protocol of one client connection."""

    def __init__(self, site: Site[Connection], loop: asyncio.AbstractEventLoop) -> None:
        self.options = site.options
        self.loop = loop
        self.peer_name = "-"
        self.calls: dict[int, H2Call] = {}
        self._site = site
        self._transport: asyncio.Transport | None = None
        self._guard = Guard(self.options.max_concurrent_streams, loop.time)
        unread_bytes = _UNREAD_STREAMS * self.options.stream_buffer_bytes
        self.wire = Wire(loop, self._retired, self._guard.sent, unread_bytes)
        self._judge = Judge(self.options.max_concurrent_streams)
        self._intake = Intake(loop, site.pace, self._received, self._failed)
        self._held = self._kept = 0
        self._draining = False
        self._closing = False
        self._unheard_bytes = 0
        self._patience_s = CLOSE_S
        self._owes_tls_end = False
        self._last_stream = MAX_WINDOW  # The least that a GOAWAY of ours has named.
        self._made_at = self._heard_at = self._idle_since = loop.time()
        self._pinged_at = self._close_by = self._close_at_last = self._tell_at = self._drain_at = math.inf

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by type.
        self.wire.connect(self._transport)
        self._intake.connect(self._transport)
        self.peer_name = peer_name(transport.get_extra_info("peername"))
        tune(transport)
        if not speaks_h2(transport):
            self.abort()
            return
        self.wire.say(self._judge.data_to_send())  # Our settings: nothing may come before them.
        if not self._site.admit(self):
            self.abort()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self.loop.time()
        if self._closing:  # It reads what we have said last, and gets a little longer for that.
            self._close_by = min(self._heard_at + self._patience_s, self._close_at_last)
            self._pass_over(len(data))
            return
        self._pinged_at = math.inf
        self._intake.feed(data)

    def _pass_over(self, size: int) -> None:
        """Counts what is thrown away; past the bound, the client's socket fills up instead, until the deadline."""
        had, self._unheard_bytes = self._unheard_bytes, self._unheard_bytes + size
        if had <= UNHEARD_BYTES < self._unheard_bytes:
            assert self._transport is not None
            if not self._transport.is_closing():
                self._transport.pause_reading()

    def _failed(self, error: Exception) -> None:
        if isinstance(error, ProtocolError):
            what = self._broke(error)
            self._goodbye(error.error_code, what.encode(errors="replace")[:64])
        else:
            log.error("a defect in the HTTP/2 edge; %s loses its connection", self.peer_name, exc_info=error)
            self._goodbye(ErrorCodes.INTERNAL_ERROR)

    def _broke(self, error: ProtocolError) -> str:
        """Logs what the client did wrong, and returns it."""
        what = cut(_QUOTED.split(str(error), maxsplit=1)[0], LOGGED_CHARS)
        log.info("%s broke the protocol: %r", self.peer_name, what)
        return what

    def eof_received(self) -> None:
        # A client that will send nothing more, not even window updates, is gone.
        if not self._closing:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._intake.disconnect()
        self.wire.disconnect()
        for stream in tuple(self.calls):
            self._give_up(stream)
        self._judge.dismiss()
        self._site.leave(self)

    def pause_writing(self) -> None:
        self.wire.flow(False)

    def resume_writing(self) -> None:
        self.wire.flow(True)

    # -- frames in

    def _received(self, kind: int, flags: int, stream: int, frame: bytes) -> None:
        if kind == h2_frames.WINDOW_UPDATE:
            self._window_opened(stream, frame)
        elif kind == h2_frames.PING and not stream and len(frame) == HEAD_BYTES + 8:
            if not flags & h2_frames.ACK:
                self._guard.ping()
                self.wire.say(h2_frames.ping_frame(frame[HEAD_BYTES:], ack=True))
        elif kind == h2_frames.GOAWAY and not stream and len(frame) >= HEAD_BYTES + 8:
            self._draining = True  # It opens no more streams; h2 would end those that it has.
            self._left()
        elif kind > h2_frames.CONTINUATION:
            self._guard.control()  # Unknown frames are passed over.
        elif kind == h2_frames.HEADERS:
            self._headers(flags, stream, frame)
        elif kind == h2_frames.RST_STREAM and self._is_over(stream) and len(frame) == HEAD_BYTES + 4:
            pass  # Some clients reset each stream once they have its status.
        elif kind != h2_frames.DATA or not self._data(flags, stream, frame):
            if kind == h2_frames.SETTINGS:
                self._guard.settings()
            elif self._is_busywork(kind, flags, stream, frame):
                self._guard.control()
            self._ask(frame)

    def _is_busywork(self, kind: int, flags: int, stream: int, frame: bytes) -> bool:
        if kind == h2_frames.DATA:
            padding = 1 + frame[HEAD_BYTES] if flags & h2_frames.PADDED and len(frame) > HEAD_BYTES else 0
            return len(frame) <= HEAD_BYTES + padding and not flags & h2_frames.END_STREAM
        return kind not in (h2_frames.CONTINUATION, h2_frames.RST_STREAM)

    def _is_over(self, stream: int) -> bool:
        return stream not in self.calls and 0 < stream <= self._judge.highest_inbound_stream_id

    def _headers(self, flags: int, stream: int, frame: bytes) -> None:
        whole = flags & ~h2_frames.END_STREAM == h2_frames.END_HEADERS
        block = frame[HEAD_BYTES:] if whole else b""
        head = self._judge.reopened(stream, flags, block)
        if head is not None:
            self._called(stream, head, ended=bool(flags & h2_frames.END_STREAM))
            return
        opens = stream not in self.calls
        if self._is_over(stream):
            self._guard.control()
        self._judge.read(block)
        self._ask(frame)
        if opens and (call := self.calls.get(stream)) is not None:
            self._judge.remember(stream, block, call.head)

    def _data(self, flags: int, stream: int, frame: bytes) -> bool:
        """Takes DATA the short way; False where h2 is to be asked."""
        call, size = self.calls.get(stream), len(frame) - HEAD_BYTES
        if call is None:
            if not size | flags or not 0 < stream <= self._judge.highest_inbound_stream_id:
                return False
            reopen = self._judge.passed_over(size)  # Sent before its client knew that the call is over.
        else:
            reopens = self._judge.fed(stream, flags, size) if size | flags else None
            if reopens is None:
                return False
            reopen, its = reopens
            if its and call.listening:  # A client that sends what nobody reads is stopped by its window.
                self.wire.write(h2_frames.window_update_frame(stream, its))
            call.fed(frame[HEAD_BYTES:])
            if flags & h2_frames.END_STREAM:
                call.end_of_request()
        if reopen:
            self.wire.write(h2_frames.window_update_frame(0, reopen))
        return True

    def _ask(self, frame: bytes) -> None:
        """Has h2 judge the frame."""
        for event in self._judge.receive_data(frame):
            self._happened(event)
        if said := self._judge.data_to_send():
            self.wire.write(said)  # Acknowledged settings, windows, resets of streams that are over.

    def _window_opened(self, stream: int, frame: bytes) -> None:
        if not stream:
            self.wire.opened(h2_frames.window_increment(frame, self.wire.window))
            if self.wire.waiting and self.wire.window < _STINGY_BYTES:
                self._guard.control()
            return
        call = self.calls.get(stream)
        if call is None:
            if stream > self._judge.highest_inbound_stream_id:
                raise ProtocolError("a WINDOW_UPDATE for a stream that was never opened")
            return  # It has ended meanwhile.
        try:
            call.output.window += h2_frames.window_increment(frame, call.output.window)
        except FrameTooLargeError:
            raise
        except ProtocolError as error:
            self._guard.control()
            self._reset(stream, error.error_code)
        else:
            if call.output.window < min(_STINGY_BYTES, call.output.unread_bytes):
                self._guard.control()
            call.output.resume()

    def _happened(self, event: Event) -> None:
        if isinstance(event, RequestReceived):
            assert event.stream_id is not None
            assert event.headers is not None
            self._called(event.stream_id, read_head(event.headers, _WANTED), ended=event.stream_ended is not None)
        elif isinstance(event, DataReceived):
            self._fed(event)
        elif isinstance(event, StreamEnded):
            if (call := self.calls.get(event.stream_id or 0)) is not None:
                call.end_of_request()
        elif isinstance(event, StreamReset):
            self._was_reset(event.stream_id)
        elif isinstance(event, Malformed):
            self._was_malformed(event)
        elif isinstance(event, RemoteSettingsChanged):
            self._settings_changed(event)

    def _fed(self, event: DataReceived) -> None:
        stream, size = event.stream_id or 0, event.flow_controlled_length or 0
        if size:
            self._judge.acknowledge_received_data(size, stream)
        if (call := self.calls.get(stream)) is not None and event.data:
            call.fed(event.data)

    def _was_reset(self, stream: int) -> None:
        call = self.calls.get(stream)
        if call is not None and not call.output.opened:
            self._guard.reset()
        self._give_up(stream)

    def _was_malformed(self, event: Malformed) -> None:
        stream = event.stream_id or 0
        what = self._broke(event.error)
        self._guard.control()
        if stream in self.calls:
            self._reset(stream, event.error.error_code)
        else:
            self._called(stream, malformed(what), ended=event.ended)

    def _settings_changed(self, event: RemoteSettingsChanged) -> None:
        if SettingCodes.HEADER_TABLE_SIZE in event.changed_settings:
            self.wire.prelude = TABLE_EMPTIED
        change = event.changed_settings.get(SettingCodes.INITIAL_WINDOW_SIZE)
        if change is None:
            return
        delta = change.new_value - (change.original_value or 0)
        for call in self.calls.values():
            if call.output.window + delta > MAX_WINDOW:
                raise FlowControlError("initial windows beyond their bounds")
            call.output.window += delta
            call.output.resume()

    def _called(self, stream: int, head: Head | Refusal, *, ended: bool) -> None:
        """A client opened a stream."""
        if self._draining or len(self.calls) >= self.options.max_concurrent_streams:
            self._guard.control()
            self._reset(stream, ErrorCodes.REFUSED_STREAM)
            return
        if isinstance(head, Refusal):
            prelude, self.wire.prelude = self.wire.prelude, b""
            self.wire.write(h2_frames.headers_frame(stream, prelude + head.block, end_stream=True))
            self._over(stream, unread=not ended)
            return
        call = H2Call(self, stream, head, self._judge.remote_settings.initial_window_size)
        call.ended = ended
        self.calls[stream] = call
        call.task = self._site.begin(call, self._site.handler(head.path))

    def hold(self, size: int) -> bool:
        """See `h2_call.Receiving`."""
        self._held += size
        return size < 0 or self._held <= _HELD_MESSAGES * self.options.max_message_bytes

    def keep(self, size: int) -> bool:
        """See `h2_call.Receiving`."""
        self._kept += size
        return size < 0 or self._kept <= _KEPT_MESSAGES * self.options.max_message_bytes

    # -- streams that end

    def _retired(self, stream: int) -> None:
        """The trailers are out."""
        call = self.calls.pop(stream)
        call.over()
        self._over(stream, unread=not call.ended)
        self._left()

    def _over(self, stream: int, *, unread: bool) -> None:
        """Our side of the stream is done. A client that is still sending is asked to stop."""
        if unread:
            self.wire.write(h2_frames.rst_stream_frame(stream, ErrorCodes.NO_ERROR))
        self._judge.forget(stream)

    def _reset(self, stream: int, code: int) -> None:
        """Ends a stream without a status."""
        self.wire.write(h2_frames.rst_stream_frame(stream, code))
        self._give_up(stream)

    def _give_up(self, stream: int) -> None:
        """Nobody wants the answer any more."""
        self._judge.forget(stream)
        call = self.calls.pop(stream, None)
        if call is not None:
            call.over()
            if call.task is not None:
                self._site.pace.cancel(self.loop, call.task, begun=call.begun)
            self._left()

    def _left(self) -> None:
        if not self.calls:
            self._idle_since = self.loop.time()
            if self._draining:
                self._close()

    # -- endings

    def notice(self, limit_s: float) -> None:
        """Half-way the client is asked to make its next calls elsewhere: sooner, it might be led here again. All those
        that it makes here are served."""
        self._tell_at = self.loop.time() + limit_s / 2

    def last_call(self) -> None:
        """The client shall make its next calls elsewhere; those that it makes before it knows are still served."""
        self._ask_to_leave()
        self._drain_at = self.loop.time() + LAST_CALL_S

    def _ask_to_leave(self) -> None:
        self._send_goaway(MAX_WINDOW, ErrorCodes.NO_ERROR)  # The greatest stream there can be.

    def _send_goaway(self, last_stream: int, code: int, text: bytes = b"") -> None:
        """None names a higher stream than those before it (RFC 9113, 6.8): the client may have made that call again
        elsewhere."""
        self._last_stream = min(self._last_stream, last_stream)
        self.wire.write(h2_frames.goaway_frame(self._last_stream, code, text))

    def retire(self) -> None:
        """No new calls: tells the client so, and closes when those in flight are over."""
        if self._draining or self._closing:
            return
        self._draining = True
        self._send_goaway(self._judge.highest_inbound_stream_id, ErrorCodes.NO_ERROR)
        self._left()

    def stop_short(self) -> None:
        """Ends what is left."""
        for stream in tuple(self.calls):
            self._reset(stream, ErrorCodes.CANCEL)
        self._close()

    def abort(self) -> None:
        """Drops the connection, unread output and all."""
        self._closing = True
        self._intake.stop()
        if self._transport is not None:
            self._transport.abort()

    def _goodbye(self, code: int, text: bytes = b"") -> None:
        self._send_goaway(self._judge.highest_inbound_stream_id, code, text)
        self._close(GOODBYE_S)  # First: with its last call, a draining connection would be closed at its leisure.
        self._site.dismiss(self)
        for stream in tuple(self.calls):
            self._give_up(stream)

    def _close(self, at_most_s: float | None = None) -> None:
        """Closes once the client has closed, too, that it may read it all, and `at_most_s` from now."""
        if not self._closing:
            self._closing = True
            self._intake.stop()
            now = self.loop.time()
            if not self.wire.close():
                self._patience_s, self._owes_tls_end = TLS_CLOSE_S, True
            self._close_at_last = now + (self.options.read_timeout_s if at_most_s is None else at_most_s)
            self._close_by = min(now + self._patience_s, self._close_at_last)

    def _end(self, now: float) -> None:
        """Drops a connection whose time is over. Over TLS it says so first, lest the client take it for a truncation,
        and is dropped by the next sweep."""
        if self._owes_tls_end and self._transport is not None:
            self._owes_tls_end = False
            self._close_by = self._close_at_last = now
            self._transport.close()
        else:
            self.abort()

    # -- deadlines

    def sweep(self, now: float) -> None:
        """Ends what has waited too long."""
        options = self.options
        if self._closing:
            if now > self._close_by:
                self._end(now)
            return
        if now > self._tell_at:
            self._tell_at = math.inf
            self._ask_to_leave()
        if now > self._drain_at:
            self.retire()
        if not self._intake.ready:
            if now > self._made_at + HANDSHAKE_S:
                self.abort()
            return
        if now > self._intake.stuck_since + options.request_timeout_s:
            self._goodbye(ErrorCodes.ENHANCE_YOUR_CALM, b"a frame takes too long")
            return
        for stream, call in tuple(self.calls.items()):
            if call.is_overdue(now):
                self._reset(stream, ErrorCodes.CANCEL)
        if now > self._pinged_at + options.keepalive_timeout_s:
            log.info("cut %s, which does not answer pings", self.peer_name)
            self.abort()
        elif self._pinged_at == math.inf and now > self._heard_at + options.keepalive_time_s:
            self._pinged_at = now
            self.wire.say(h2_frames.ping_frame(_PING, ack=False))
        elif not self.calls and now > self._idle_since + options.idle_timeout_s:
            self.retire()
