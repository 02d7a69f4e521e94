"""h2 as the judge of what a client sends: header blocks, settings, and the order and state of streams.

Rule: h2 is asked about input alone. It knows nothing of what is sent, neither of answers nor of windows, so streams
that are over are taken from it here. Two things that every call brings have short ways past h2's general one: headers
in the very bytes of an earlier call's, and plain request data.
"""

from __future__ import annotations

from typing import Final

from h2.config import H2Configuration
from h2.connection import AllowedStreamIDs, H2Connection
from h2.events import Event
from h2.exceptions import InvalidBodyLengthError, ProtocolError, StreamClosedError, StreamIDTooLowError
from h2.settings import SettingCodes, Settings
from h2.stream import StreamClosedBy, StreamInputs, StreamState
from hpack.exceptions import HPACKError
from hyperframe.frame import DataFrame, Frame, HeadersFrame, WindowUpdateFrame

from router.ingress.h2_frames import DEFAULT_WINDOW, END_HEADERS, END_STREAM, PREFACE
from router.ingress.h2_headers import MAX_LIST_BYTES, Head

_STREAM_WINDOW: Final = 1 << 18
_CONNECTION_WINDOW: Final = 1 << 22
_MAX_HEADS: Final = 64
_HARD_LIST_BYTES: Final = 4 * MAX_LIST_BYTES  # Above it, a list of headers costs the connection and not the call.


class Malformed(Event):
    """A request, or its trailers, that breaks HTTP's rules: an error of its stream alone (RFC 9113, 8.1.1)."""

    def __init__(self, stream: int, error: ProtocolError, *, ended: bool) -> None:
        self.stream_id = stream
        self.error = error
        self.ended = ended
        """Nothing follows it on its stream."""


class Judge(H2Connection):
    """One connection's. Streams that are over are forgotten at once, instead of looked for at each new one."""

    MAX_CLOSED_STREAMS = 256

    def __init__(self, max_streams: int) -> None:
        super().__init__(H2Configuration(client_side=False))
        settings = {
            SettingCodes.MAX_CONCURRENT_STREAMS: max_streams,
            SettingCodes.MAX_HEADER_LIST_SIZE: MAX_LIST_BYTES,
            SettingCodes.INITIAL_WINDOW_SIZE: _STREAM_WINDOW,
        }
        self.local_settings = Settings(client=False, initial_values=settings)
        self.decoder.max_header_list_size = _HARD_LIST_BYTES
        self._heads: dict[bytes, Head] = {}
        """Of header blocks that h2 has read and found right, while the table by which they are read is the same."""
        self.initiate_connection()
        self.increment_flow_control_window(_CONNECTION_WINDOW - DEFAULT_WINDOW)
        self.receive_data(PREFACE)  # `FrameCutter` has taken the client's.

    @property
    def open_inbound_streams(self) -> int:
        """None, for h2: one stream too many would cost the connection. `Connection` refuses that stream alone."""
        return 0

    def reopened(self, stream: int, flags: int, block: bytes) -> Head | None:
        """The head of a new call that sends an earlier call's header block again; its stream is open then.

        None where the block is another one, or anything about the stream is unusual: h2 is to be asked.
        """
        head = self._heads.get(block)
        if head is None or flags & ~END_STREAM != END_HEADERS or stream <= self.highest_inbound_stream_id:
            return None
        if not stream & 1:
            return None
        opened = self._begin_new_stream(stream, AllowedStreamIDs.ODD).state_machine
        opened.process_input(StreamInputs.RECV_HEADERS)
        if flags & END_STREAM:
            opened.process_input(StreamInputs.RECV_END_STREAM)
        return head

    def read(self, block: bytes) -> None:
        """h2 reads a header block that may change the table by which all others are read."""
        if not _is_indexed(block):
            self._heads.clear()

    def remember(self, stream: int, block: bytes, head: Head) -> None:
        """What the block that opened this stream says, for as long as the table stays as it is."""
        if _is_indexed(block) and len(self._heads) < _MAX_HEADS:
            opened = self.streams.get(stream)
            if opened is not None and opened._expected_content_length is None:
                self._heads[block] = head

    def fed(self, stream: int, flags: int, size: int) -> tuple[int, int] | None:
        """Takes plain DATA of an open stream: by what to reopen the windows of the connection and of the stream.

        None where anything about it is unusual: h2 is to be asked.
        """
        fed = self.streams[stream]
        machine = fed.state_machine
        if flags & ~END_STREAM or machine.state is not StreamState.OPEN or fed._expected_content_length is not None:
            return None
        ours, its = self._inbound_flow_control_window_manager, fed._inbound_window_manager
        ours.window_consumed(size)
        its.window_consumed(size)
        if flags & END_STREAM:
            machine.process_input(StreamInputs.RECV_END_STREAM)
            return ours.process_bytes(size) or 0, 0
        return ours.process_bytes(size) or 0, its.process_bytes(size) or 0

    def passed_over(self, size: int) -> int:
        """DATA came for a stream that is over, and counts in the connection's window; returns what to reopen it by."""
        self._inbound_flow_control_window_manager.window_consumed(size)
        return self._inbound_flow_control_window_manager.process_bytes(size) or 0

    def _receive_headers_frame(self, frame: HeadersFrame) -> tuple[list[Frame], list[Event]]:
        """As h2 does, which would end the connection for a malformed request."""
        try:
            judged: tuple[list[Frame], list[Event]] = super()._receive_headers_frame(frame)
        except (StreamClosedError, StreamIDTooLowError):
            raise
        except ProtocolError as error:
            # A block that cannot be read costs the table by which all others are.
            if frame.stream_id not in self.streams or isinstance(error.__cause__, HPACKError):
                raise
            return [], [Malformed(frame.stream_id, error, ended="END_STREAM" in frame.flags)]
        return judged

    def _receive_data_frame(self, frame: DataFrame) -> tuple[list[Frame], list[Event]]:
        """As h2 does, which would end the connection for a body of another length than its headers say."""
        try:
            judged: tuple[list[Frame], list[Event]] = super()._receive_data_frame(frame)
        except InvalidBodyLengthError as error:
            reopen = self._inbound_flow_control_window_manager.process_bytes(frame.flow_controlled_length)
            frames: list[Frame] = [WindowUpdateFrame(0, window_increment=reopen)] if reopen else []
            return frames, [Malformed(frame.stream_id, error, ended="END_STREAM" in frame.flags)]
        return judged

    def _stream_is_closed_by_reset(self, stream_id: int) -> bool:
        """Of streams that are over all count as reset; of older ones than are remembered it is taken for granted."""
        if super()._stream_is_closed_by_reset(stream_id):
            return True
        return len(self._closed_streams) >= self.MAX_CLOSED_STREAMS and stream_id not in self.streams

    def forget(self, stream: int) -> None:
        """What still comes for this stream is answered as for one that we reset."""
        if self.streams.pop(stream, None) is not None:
            self._closed_streams[stream] = StreamClosedBy.SEND_RST_STREAM

    def dismiss(self) -> None:
        """Judges no more. h2's tables of its own methods would keep all this until the garbage collector came."""
        self._frame_dispatch_table.clear()


def _is_indexed(block: bytes) -> bool:
    """Whether the block only points into the table, each field in one byte: then it leaves the table as it is."""
    return block != b"" and min(block) > 127 and max(block) < 255
