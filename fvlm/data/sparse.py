"""Decoding only what the wanted frames of a video need, found from the packets' presentation times.

A frame needs the keyframe before it and, from there on, what later frames are predicted from. So whole groups of
pictures without a wanted frame are left out, and so are pictures that no other refers to. Whatever is out of the
ordinary raises `Unsure`: then everything has to be decoded, in order.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np

from fvlm.data.bitstream import Bitstream
from fvlm.data.upright import Shaper
from fvlm.data.video_file import TICK, VideoFile

_REORDER = 32  # packets: H.264 and HEVC decode at most 16 frames, of two fields each, before one that is shown earlier
_MOST_WAITING = 256 << 20  # bytes of packets that wait until it is known what is wanted of them
_FAR = 20.0  # seconds between wanted times from which on seeking is cheaper than reading on


class Unsure(Exception):
    """The packets do not tell, or not what came out of the decoder."""


class Short(Exception):
    """By its packets the video ends `end` seconds after its first frame, before the last wanted time."""

    def __init__(self, end: float):
        super().__init__(end)
        self.end = end


class _Astray(Exception):
    """Seeking did not lead to a keyframe that helps."""


def packets_duration(file: VideoFile) -> float:
    """Seconds from the start of the first frame to the end of the last, by the packets alone. Raises Unsure."""
    first, end = None, 0.0
    for packet in _packets(file):
        if not packet.is_discard:
            first = packet.pts if first is None else min(first, packet.pts)
            end = max(end, file.end(packet))
    if first is None:
        raise Unsure("no packets")
    return end - first * float(file.stream.time_base)


def read_sparsely(file: VideoFile, times: np.ndarray, shape: Shaper) -> list[np.ndarray]:
    """Pictures (uint8 [size, size, 3]) at the ascending `times`, each the last one shown at or before its time.

    Raises Unsure, Short, and MediaError as `Shaper` does.
    """
    try:
        return _SparseDecoder(file, times, shape, seeking=file.seekable).take()
    except _Astray:
        file.rewind()
        return _SparseDecoder(file, times, shape, seeking=False).take()


def _packets(file: VideoFile) -> Iterator[av.Packet]:
    """The packets of the file, each whole and with a presentation time. Raises Unsure."""
    packets = file.packets()
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:
            raise Unsure(str(error)) from error
        if packet is None or packet.size == 0:
            return
        if packet.pts is None or packet.is_corrupt or packet.has_sidedata("new_extradata"):
            raise Unsure("a packet without a time, damaged, or with another configuration of the decoder")
        yield packet


class _Timeline:
    """Which frame is shown at each wanted time: presentation times come in decoding order, chosen ones go out."""

    def __init__(self, times: np.ndarray, base: float):
        self._times, self._base = times, base  # seconds; seconds a tick
        self._seen: list[int] = []  # ticks of frames known, ascending, from the last chosen on
        self.first: int | None = None
        """Ticks of the first frame shown, once known."""
        self.chosen: list[int] = []
        """Ticks of the frames shown at the times settled so far."""
        self.settled: int | None = None
        """Ticks up to which it is known what is wanted."""

    @property
    def done(self) -> bool:
        return len(self.chosen) == len(self._times)

    @property
    def coming(self) -> int:
        """The latest tick at which a frame may start that is shown at the next wanted time."""
        return self.first + int((self._times[len(self.chosen)] + TICK) / self._base)

    def add(self, pts: int) -> None:
        at = bisect_left(self._seen, pts)
        if self._seen[at : at + 1] == [pts] or (self.settled is not None and pts <= self.settled):
            raise Unsure("two frames of one time, or times that jump back")
        self._seen.insert(at, pts)

    def forget(self) -> None:
        """What was seen lies before a keyframe that is shown at or before the next wanted time."""
        self._seen.clear()

    def settle(self, ahead: int) -> Iterator[int]:
        """Ticks of the frame for each wanted time that at least `ahead` frames known are shown after."""
        if self.first is None:
            if len(self._seen) < max(ahead, 1):
                return
            self.first = self._seen[0]
        while not self.done:
            limit = self.coming
            shown = bisect_right(self._seen, limit)
            if not shown or len(self._seen) - shown < ahead:
                return
            del self._seen[: shown - 1]
            self.settled = limit
            self.chosen.append(self._seen[0])
            yield self._seen[0]


class _Waiting(NamedTuple):
    packet: av.Packet
    pts: int
    begins_anew: bool


class _SparseDecoder:
    """Packets wait until it is known which of them is shown at the next wanted time.

    Then the decoder gets those that this frame needs, told (`skip_frame`) to leave out what is neither wanted itself
    nor referred to.
    """

    def __init__(self, file: VideoFile, times: np.ndarray, shape: Shaper, seeking: bool):
        self._file, self._times, self._shape, self._seeking = file, times, shape, seeking
        self._context = file.stream.codec_context
        self._context.options |= {"err_detect": "explode"}  # what stands in for damage depends on what came before
        self._bitstream = Bitstream(self._context)
        self._base = float(file.stream.time_base)
        self._timeline = _Timeline(times, self._base)
        self._waiting: list[_Waiting] = []  # neither decoded nor left out yet, in decoding order
        self._waiting_bytes = 0
        self._opening: int | None = None  # ticks of the first packet
        self._in_band: set[bytes] = set()  # parameter sets in the first packet
        self._sought = False  # the next packet is the first after seeking
        self._gap = False  # something was left out since the last packet that was decoded
        self._after_gap: int | None = None  # ticks of the keyframe after the last gap
        self._expected: int | None = None  # ticks of the frame that must come out of the decoder next
        self._came_out: int | None = None  # ticks of the last frame that came out of the decoder
        self._wanted: set[int] = set()  # chosen, still to come out of the decoder
        self._later: dict[int, av.VideoFrame] = {}  # decoded, shown later than what is settled
        self._pictures: dict[int, np.ndarray] = {}

    def take(self) -> list[np.ndarray]:
        if not self._bitstream.random_access or not self._file.orders_frames:
            raise Unsure("a codec or a container whose packets tell too little")
        end = 0.0
        for packet in _packets(self._file):
            if not packet.is_discard:
                end = max(end, self._file.end(packet))
            self._admit(packet)
            if self._choose(_REORDER):
                self._seek_ahead(packet.pts)
            if self._timeline.done:
                break
        else:
            self._choose(0)
            if not self._timeline.done:
                raise Unsure("no packet shown at some wanted time")
            end -= self._timeline.first * self._base
            if self._times[-1] > end + TICK:
                raise Short(end)
        self._drain()
        if self._wanted:
            raise Unsure("a packet without a frame")
        return [self._pictures[pts] for pts in self._timeline.chosen]

    def _admit(self, packet: av.Packet) -> None:
        timeline, this = self._timeline, _Waiting(packet, packet.pts, self._bitstream.begins_anew(packet))
        if self._sought:
            helps = this.begins_anew and timeline.settled < this.pts <= timeline.coming
            if not helps or self._bitstream.parameter_sets(packet) != self._in_band:
                raise _Astray(f"seeking led to {this.pts}")
            self._sought = False
        if not packet.is_discard:
            timeline.add(this.pts)
        if self._opening is None:
            if not this.begins_anew:
                raise Unsure("the first packet is not a keyframe")
            self._opening, self._expected = this.pts, None if packet.is_discard else this.pts
            self._in_band = self._bitstream.parameter_sets(packet)
            self._decode(this)  # wanted or not: to see that it can be
            return
        self._waiting.append(this)
        self._waiting_bytes += packet.size
        if this.begins_anew and timeline.first is not None and this.pts <= timeline.coming:
            self._leave_out(len(self._waiting) - 1)
        if self._waiting_bytes > _MOST_WAITING:
            raise Unsure("too much to hold between two wanted times")

    def _choose(self, ahead: int) -> bool:
        """Settle what can be settled, and decode what that needs; whether there was anything."""
        before = len(self._timeline.chosen)
        for pts in self._timeline.settle(ahead):
            if self._timeline.first < self._opening:
                raise Unsure("frames that are shown before the first keyframe")
            if pts in self._pictures or pts in self._wanted:
                continue
            shown = self._later.get(pts)
            self._later = {later: frame for later, frame in self._later.items() if later > pts}
            if shown is not None:
                self._pictures[pts] = self._shape(shown)
                continue
            self._wanted.add(pts)
            for at, waiting in enumerate(self._waiting):
                if waiting.pts == pts and not waiting.packet.is_discard:
                    self._decode_to(at)
                    break
        return len(self._timeline.chosen) > before

    def _seek_ahead(self, pts: int) -> None:
        """Go on at the keyframe before the next wanted time, if that is far from `pts`."""
        if not self._seeking or self._timeline.done:
            return
        # containers look at decoding times, which may be up to so much earlier
        target = self._timeline.coming - int(_REORDER * self._file.usual_duration / self._base)
        if (target - pts) * self._base < _FAR:
            return
        self._drain()  # seeking empties the decoder
        self._file.seek(target)
        self._timeline.forget()
        self._waiting.clear()
        self._waiting_bytes = 0
        self._gap = self._sought = True

    def _decode_to(self, at: int) -> None:
        """Decode waiting packet `at` and what it needs."""
        pts = self._waiting[at].pts
        begin = max(
            (i for i, each in enumerate(self._waiting[: at + 1]) if each.begins_anew and each.pts <= pts), default=0
        )
        at -= self._leave_out(begin)
        for waiting in self._waiting[: at + 1]:
            self._decode(waiting)
            self._waiting_bytes -= waiting.packet.size
        del self._waiting[: at + 1]

    def _leave_out(self, count: int) -> int:
        """Leave out the first `count` waiting packets, which the next does not need; how many were left out."""
        if not count:
            return 0
        parameter_sets = [self._bitstream.parameter_sets(each.packet) for each in self._waiting[: count + 1]]
        if not set().union(*parameter_sets) <= parameter_sets[-1]:  # the next does not repeat them
            return 0
        self._waiting_bytes -= sum(each.packet.size for each in self._waiting[:count])
        del self._waiting[:count]
        self._gap = True
        return count

    def _decode(self, waiting: _Waiting) -> None:
        if self._gap:
            self._drain()
            depth = self._context.reorder_depth
            self._context.flush_buffers()
            self._context.reorder_depth = depth  # forgotten, the decoder would give up frames out of order
            self._gap, self._after_gap, self._expected = False, waiting.pts, waiting.pts
        if self._after_gap is not None and waiting.pts < self._after_gap:
            return  # shown before the keyframe that decoding began with: predicted from what was left out
        settled, chosen = self._timeline.settled, self._timeline.chosen
        wanted = settled is None or waiting.pts > settled or waiting.pts == chosen[-1]
        leave_out = self._bitstream.tells_references and not wanted
        self._context.skip_frame = "NONREF" if leave_out else "DEFAULT"
        try:
            self._come_out(waiting.packet.decode())
        except av.FFmpegError as error:
            raise Unsure(str(error)) from error

    def _drain(self) -> None:
        """Bring out the frames that the decoder holds back."""
        try:
            self._come_out(self._context.decode(None))
        except av.EOFError:  # it was drained before
            return
        except av.FFmpegError as error:
            raise Unsure(str(error)) from error

    def _come_out(self, frames: list[av.VideoFrame]) -> None:
        for frame in frames:
            if self._expected is not None and (frame.pts != self._expected or not frame.key_frame):
                raise Unsure("decoding began with another frame than the keyframe")
            if self._came_out is not None and frame.pts <= self._came_out:
                raise Unsure("frames come out in another order than that of their times")
            self._expected, self._came_out = None, frame.pts
            if frame.pts in self._wanted:
                self._wanted.remove(frame.pts)
                self._pictures[frame.pts] = self._shape(frame)
            elif self._timeline.settled is None or frame.pts > self._timeline.settled:
                self._later[frame.pts] = frame
