"""The console writer: its output as text, with control characters escaped."""

import io

import numpy as np
import pytest
import torch

from fxtrain.values import Histogram, HParams, Table, Text
from fxtrain.writers import console

pytestmark = pytest.mark.usefixtures("without_pyav")  # videos are GIFs


def test_console_prints_scalars_texts_and_hparams(capsys):
    writer = console()
    table = Table({"word": ["cat"], "n": [1]})
    values = {"loss": 0.123456789, "n": 3, "flag": True, "nan": float("nan"), "said": Text("one\n\ntwo"), "t": table}
    writer.write(7, values)
    writer.write_hparams({"lr": 0.1, "optim": {"name": "adamw"}})
    writer.write(8, {"empty": Text("")})
    with pytest.warns(RuntimeWarning, match="ConsoleWriter does not store histograms"):
        writer.write(8, {"h": Histogram(torch.ones(3))})
    writer.write(9, {"none": HParams({})})
    writer.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 7 | loss 0.123457 | n 3 | flag True | nan nan",
        "step 7 | said:",
        "  one",
        "  ",
        "  two",
        "step 7 | t:",
        "  | word | n |",
        "  | --- | --- |",
        "  | cat | 1 |",
        "hparams:",
        "  lr          0.1",
        "  optim/name  adamw",
        "step 8 | empty:",
        "none:",
    ]


def test_console_leaves_its_file_open(tmp_path):
    with open(tmp_path / "log.txt", "w") as file:
        writer = console(file)
        writer.write_scalars(1, {"loss": torch.tensor(0.5)})
        writer.flush()
        assert (tmp_path / "log.txt").read_text() == "step 1 | loss 0.5\n"
        writer.close()
        writer.write_scalars(2, {"loss": np.float32(0.25)})
    assert (tmp_path / "log.txt").read_text().splitlines() == ["step 1 | loss 0.5", "step 2 | loss 0.25"]


HOSTILE = "a\x1b[2J\x07\x9b\x7f\n\u202eb\ud800"
SHOWN = "a\\x1b[2J\\x07\\x9b\\x7f\\n\\u202eb\\ud800"


def test_console_escapes_terminal_control_characters(capsys):
    writer = console()
    writer.write(1, {HOSTILE: 1.0, f"{HOSTILE}!": Text(f"one\t{HOSTILE}\r\ntwo\x0c\n")})
    writer.write_hparams({HOSTILE: HOSTILE})
    writer.close()
    first, second = SHOWN.split("\\n")
    assert capsys.readouterr().out.split("\n") == [
        f"step 1 | {SHOWN} 1",
        f"step 1 | {SHOWN}!:",
        f"  one\t{first}",
        f"  {second}",
        "  two\\x0c",
        "hparams:",
        f"  {SHOWN}  {SHOWN}",
        "",
    ]


def test_console_escapes_characters_outside_the_file_encoding():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console(file).write_texts(1, {"a": "wörld"})
    file.flush()
    assert file.buffer.getvalue() == b"step 1 | a: w\\xf6rld\n"
