"""Videos: whole ones of every container are read to their end, and those that are cut off say so."""

from __future__ import annotations

import os
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ccgpu.models.image_files import BadImage

av = pytest.importorskip("av")

from ccgpu.train.data.video import Video, VideoWriter  # noqa: E402

FRAMES = 30
# Container -> codec. FFmpeg cannot say of mpg, ts and wmv where they were to end.
WRITERS = {
    "mp4": "libx264", "mov": "mpeg4", "avi": "mpeg4", "mkv": "libx264", "webm": "libvpx", "flv": "flv",
    "mpg": "mpeg2video", "ts": "libx264", "wmv": "wmv2",
}  # fmt: skip
ANNOUNCED = ("avi", "mkv", "webm", "flv")  # say where they end at their beginning


def write(path: Path, times: list[int] | None = None, **options: str) -> Path:
    """Write frames of noise, 25 a second, at the given times in frames."""
    codec = WRITERS[path.suffix[1:]]
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV is built without {codec}")
    generator = np.random.default_rng(0)
    with av.open(str(path), mode="w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(FRAMES) if times is None else times:
            frame = av.VideoFrame.from_ndarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def count(path: Path) -> int:
    with Video(path) as video:
        return sum(1 for _ in video)


@pytest.mark.parametrize("container", WRITERS)
def test_a_whole_video_is_read_to_its_end(container: str, tmp_path: Path) -> None:
    assert count(write(tmp_path / f"video.{container}")) == FRAMES


@pytest.mark.parametrize("container", ANNOUNCED)
def test_a_video_that_is_cut_off_gives_its_frames_and_then_fails(container: str, tmp_path: Path) -> None:
    whole = write(tmp_path / f"video.{container}")
    cut = tmp_path / f"cut.{container}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    seen: list[np.ndarray] = []
    with Video(cut) as video, pytest.raises(BadImage, match=rf"cut\.{container}, which ends after \d+ of 30 frames"):
        seen.extend(video)
    assert 3 <= len(seen) < 25


def test_an_mp4_with_its_index_in_front_fails_where_it_is_cut(tmp_path: Path) -> None:
    whole = write(tmp_path / "video.mp4", movflags="faststart")
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(BadImage, match=r"cut\.mp4"):
        count(tmp_path / "cut.mp4")


@pytest.mark.parametrize("container", ["avi", "mkv", "mp4"])
def test_a_recording_may_leave_frames_out_where_nothing_changes(container: str, tmp_path: Path) -> None:
    times = [*range(8), *range(40, 60), 90]
    assert count(write(tmp_path / f"video.{container}", times)) == len(times)


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_frames_are_turned_upright(matrix: tuple[int, int, int, int], turns: int, tmp_path: Path) -> None:
    """Phones store the rotation as the matrix of the track's header, after 40 bytes of other values."""
    whole = write(tmp_path / "video.mov")
    content = bytearray(whole.read_bytes())
    begin = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    content[begin : begin + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mov").write_bytes(content)
    with Video(whole) as stored, Video(tmp_path / "turned.mov") as turned:
        assert np.array_equal(next(iter(turned)), np.rot90(next(iter(stored)), turns))


def test_a_video_without_frames_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "video.avi").read_bytes()
    (tmp_path / "empty.avi").write_bytes(whole[: whole.index(b"movi") + 4])
    with pytest.raises(BadImage, match=r"empty\.avi"):
        count(tmp_path / "empty.avi")


def test_a_file_that_is_no_video_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(BadImage, match=r"text\.mp4, which does not open \(Invalid data[^:\[]*\); copy or convert it"):
        Video(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "sound.wav"), mode="w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(BadImage, match=r"sound\.wav, which holds no images; leave it out"):
        Video(tmp_path / "sound.wav")


def test_a_named_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(BadImage, match="named pipe"):
        Video(tmp_path / "pipe.mp4")
    with pytest.raises(FileNotFoundError):
        Video(tmp_path / "nowhere.mp4")


def test_a_writer_leaves_no_file_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        with VideoWriter(path, Fraction(10)) as writer:
            writer.add(np.zeros((48, 64, 3), np.uint8))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted(tmp_path / "video.mp4")
    assert not list(tmp_path.iterdir())

    def full_disk(*names: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    writer = VideoWriter(tmp_path / "video.mp4", Fraction(10))
    writer.add(np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(OSError, match="No space"):
        writer.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())
