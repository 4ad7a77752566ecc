"""What the packets of a video stream say about who needs whom, found without decoding them."""

from __future__ import annotations

from collections.abc import Iterator

import av

_IDR = 5  # H.264: a keyframe after which nothing refers to what came before it
_PARAMETER_SETS = {"h264": {7, 8}, "hevc": {32, 33, 34}}
_SELF_CONTAINED = ("h264", "hevc", "vp8", "vp9", "av1")  # codecs whose keyframes can begin a decoding


class Bitstream:
    """Reads the packets of one stream, by the codec's name and the header's decoder configuration."""

    def __init__(self, context: av.VideoCodecContext):
        codec, header = context.codec, context.extradata or b""
        self._name = codec.canonical_name
        self.random_access = codec.intra_only or self._name in _SELF_CONTAINED
        """Whether decoding may begin at keyframes in the middle, and give the same pictures."""
        self.tells_references = self._name == "h264" or (self._name == "hevc" and _one_layer(header))
        """Whether the decoder can leave out just the pictures that no other is predicted from.

        HEVC marks them within a temporal layer only. VP8, VP9 and AV1 carry probabilities from picture to picture.
        """
        at = 21 if self._name == "hevc" else 4
        configured = header[:1] == b"\x01" and len(header) > at  # hvcC, avcC: NAL units with their length before them
        self._length_bytes = header[at] % 4 + 1 if configured else 0

    def begins_anew(self, packet: av.Packet) -> bool:
        """Whether pictures shown from this one on depend on nothing before it but parameter sets.

        An H.264 keyframe may also be a recovery point, after which pictures become right little by little.
        """
        if not (packet.is_keyframe and self.random_access):
            return False
        return self._name != "h264" or any(self._type(unit) == _IDR for unit in self._units(packet))

    def parameter_sets(self, packet: av.Packet) -> set[bytes]:
        """NAL units of the packet that later pictures may need, whatever comes between."""
        wanted = _PARAMETER_SETS.get(self._name)
        return {unit for unit in self._units(packet) if self._type(unit) in wanted} if wanted else set()

    def _type(self, unit: bytes) -> int:
        return unit[0] >> 1 & 63 if self._name == "hevc" else unit[0] & 31

    def _units(self, packet: av.Packet) -> Iterator[bytes]:
        """The packet's NAL units."""
        content, prefix = bytes(packet), self._length_bytes
        if not prefix:  # Annex B: units after start codes, perhaps with zeros after them
            yield from filter(None, (unit.rstrip(b"\0") for unit in content.split(b"\0\0\1")))
            return
        at = 0
        while at + prefix < len(content):
            begin, count = at + prefix, int.from_bytes(content[at : at + prefix], "big")
            at = begin + count
            if count:
                yield content[begin:at]


def _one_layer(configuration: bytes) -> bool:
    """Whether an HEVC decoder configuration record says that there is one temporal layer."""
    return configuration[:1] == b"\x01" and len(configuration) > 21 and configuration[21] >> 3 & 7 == 1
