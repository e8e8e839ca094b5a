"""Names that the console cannot show, and names of files that are not UTF-8: no command fails because of them."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from ccgpu.models.labels import Labels
from ccgpu.train import attention, camvid, convert, evaluate, export, predict
from ccgpu.train.distributed import say
from tests.train.training import TINY

LABELS = Labels(
    ("Gehweg \u00fc", "\u9053\u8def", *camvid.LABELS.names[2:]),
    np.array(camvid.LABELS.colours),
    camvid.LABELS.ids,
    camvid.LABELS.void,
)


def ascii_console(monkeypatch: pytest.MonkeyPatch) -> tuple[io.BytesIO, io.BytesIO]:
    """Make stdout and stderr a console that shows ASCII alone, and return what they are sent.

    Python opens them like this with PYTHONIOENCODING=ascii: stderr escapes other characters, stdout raises.
    """
    streams = {"stdout": (io.BytesIO(), "strict"), "stderr": (io.BytesIO(), "backslashreplace")}
    for name, (content, errors) in streams.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(content, "ascii", errors=errors, write_through=True))
    return streams["stdout"][0], streams["stderr"][0]


def test_say_escapes_what_the_console_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = ascii_console(monkeypatch)
    say("road, Gehweg \u00fc, \u9053\u8def, \udcff")
    assert out.getvalue() == b"road, Gehweg \\xfc, \\u9053\\u8def, \\udcff\n"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are Unicode")
def test_every_command_takes_such_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, told = ascii_console(monkeypatch)
    monkeypatch.setattr(camvid, "DATASET", dataclasses.replace(camvid.DATASET, labels=LABELS))
    folder = tmp_path / os.fsdecode(b"d\xff")
    first, out = folder / "first", folder / "run"
    assert camvid.main([*TINY, "--out", str(first)]) == 0
    assert b"Gehweg \\xfc" in shown.getvalue()
    for path in (first / "scenes").rglob("*_f*"):
        path.rename(path.with_name(os.fsdecode(b"n\xe9") + path.name))
    assert camvid.main([*TINY, "--data", str(first / "scenes"), "--out", str(out)]) == 0
    assert camvid.main(["--resume", "--out", str(out)]) == 0
    network, image = folder / "net.safetensors", next((first / "scenes" / "val").iterdir())
    last = ["--checkpoint", str(out / "last.pt")]
    predictions = ["--save-predictions", str(folder / "submission"), "--record", str(folder / "scores.jsonl")]
    assert evaluate.main([*last, "--workers", "0", *predictions]) == 0
    assert convert.main([str(out / "last.pt"), str(network)]) == 0
    assert predict.main(["--checkpoint", str(network), str(image), "--out", str(folder / "predicted")]) == 0
    assert attention.main([*last, str(image), "--out", str(folder / "a.png"), "--html", str(folder / "a.html")]) == 0
    assert export.main([*last, "--to", "torch-export", "--out", str(folder / "a.pt2")]) == 2
    assert b"export: --out must be a path in UTF-8 for torch and ONNX" in told.getvalue()
    assert camvid.main([*TINY, "--tensorboard", "--out", str(folder / "board")]) == 2
    assert b"train: --out must be a path in UTF-8 for TensorBoard (--no-tensorboard writes no" in told.getvalue()
