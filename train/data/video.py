"""Reading and writing video files frame by frame, through PyAV (optional dependency, extra `video`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ccgpu.models.image_files import BadImage, check_regular

# In order of preference: the first one that PyAV was built with is used. Browsers play H.264, which libx264 writes.
CODECS = ("libx264", "mpeg4")
# A file is taken as cut off if it lacks more than these frames of those that its header announces. Files that FFmpeg
# writes as mp4, mov, avi, mkv, webm, flv, wmv, mpg and ts, with sound and without, lack none.
MISSING_FRAMES, MISSING_SHARE = 1, 0.01
MICROSECONDS = 1_000_000  # FFmpeg's unit of a container's time


def _av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ModuleNotFoundError(
            f'video: PyAV must be installed to read videos, got {error}; pip install "ccgpu[video]".'
        ) from error
    return av


class Video:
    """A reader of a video file: `with Video(path) as video: for frame in video: ...`.

    Frames are uint8 (H, W, 3) RGB, turned upright.

    Attributes:
        rate: frames per second.
        frames: number of frames according to the file; None where it does not say.

    Raises:
        ModuleNotFoundError: PyAV is not installed.
        FileNotFoundError: there is no such file.
        BadImage: the file is no video, or, during iteration, cannot be decoded any further, or has ended before the
            end that its header announces, or without a frame. The message names the file.
    """

    def __init__(self, path: Path) -> None:
        av = _av()
        check_regular(path)
        self.path = path
        self._errors = av.error.FFmpegError
        try:
            self._container = av.open(str(path))
        except av.error.FFmpegError as error:
            raise BadImage(
                f"Video: path must be a video, got {path}, which does not open ({error.strerror}); copy or convert it "
                "again."
            ) from error
        if not self._container.streams.video:
            self._container.close()
            raise BadImage(f"Video: path must be a video, got {path}, which holds no images; leave it out.")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = Fraction(self._stream.average_rate or 25)
        self.frames: int | None = self._stream.frames or None

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *error: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        seen, first, end = 0, 0.0, 0.0
        try:
            for frame in self._container.decode(self._stream):
                if frame.time is not None:
                    first = frame.time if seen == 0 else min(first, frame.time)
                    end = max(end, frame.time)
                pixels = frame.to_ndarray(format="rgb24")
                # Phones store frames in the orientation of the sensor, along with the rotation in degrees that turns
                # them upright.
                turns = round(getattr(frame, "rotation", 0) / 90)
                yield np.ascontiguousarray(np.rot90(pixels, turns))
                seen += 1
        except self._errors as error:
            raise BadImage(
                f"Video: file must be a whole video, got {self.path}, which does not decode after {seen} frames "
                f"({error}); copy it again."
            ) from error
        announced = self._announced()
        # A file may hold fewer frames than it counts, without being cut: a recording stores none where nothing changes.
        # Its last frame then lies where its header says that it ends.
        reached = round((end - first) * self.rate) + 1
        missing = announced - max(seen, reached)
        if seen == 0 or missing > MISSING_FRAMES + MISSING_SHARE * announced:
            raise BadImage(
                f"Video: file must be a whole video, got {self.path}, which ends after {seen} of "
                f"{announced or 'an unknown number of'} frames; copy it again."
            )

    def _announced(self) -> int:
        """Return how many frames the header announces, as a number or by their time; 0: it does not say."""
        if self._stream.frames and "avi" in self._container.format.name:
            return self._stream.frames  # FFmpeg shortens an AVI's time to the file's size
        time = 0.0
        if self._stream.duration is not None:
            time = float(self._stream.duration * self._stream.time_base)
        elif "DURATION" in self._stream.metadata:  # of Matroska and WebM, as hours:minutes:seconds
            for part in self._stream.metadata["DURATION"].split(":"):
                time = 60 * time + float(part)
        elif len(self._container.streams) == 1 and self._container.duration is not None:
            time = self._container.duration / MICROSECONDS
        return round(time * self.rate)


class VideoWriter:
    """A writer of a video file, to be used in a `with` statement: frames of equal size, uint8 (H, W, 3) RGB.

    The file is written atomically: an error inside the `with` leaves no file, or the former one. Of an odd size the
    last row or column is left out, because the pixel format requires even sizes.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._av = _av()
        self.path = path
        self.rate = rate
        self._partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def add(self, frame: np.ndarray) -> None:
        """Append a frame."""
        height, width = (max(side - side % 2, 2) for side in frame.shape[:2])
        if self._container is None:
            codec = next(name for name in CODECS if name in self._av.codecs_available)
            self._container = self._av.open(str(self._partial), mode="w")
            self._stream = self._container.add_stream(codec, rate=self.rate)
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        even = np.ascontiguousarray(frame[:height, :width])
        for packet in self._stream.encode(self._av.VideoFrame.from_ndarray(even, format="rgb24")):
            self._container.mux(packet)

    def __exit__(self, kind: object, *rest: object) -> None:
        if self._container is None:
            return
        try:
            try:
                if kind is None:
                    for packet in self._stream.encode():
                        self._container.mux(packet)
            finally:
                self._container.close()
            if kind is None:
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)  # where anything above failed
