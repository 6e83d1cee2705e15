"""The csv writer and its atomic rewrites: the output is read back with an independent library."""

import csv as reference
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxtrain.core import EvalEnd, StepEnd
from fxtrain.disk import replace_file
from fxtrain.writers import csv, jsonl, read_csv, read_jsonl

pytestmark = pytest.mark.usefixtures("without_pyav")  # videos are GIFs


def table(path):
    """Reads the rows with the csv module, without empty cells."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(reference.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows)  # all rows have the header's length
    return [{name: cell for name, cell in row.items() if cell} for row in rows]


def test_csv_has_one_row_per_call_and_one_column_per_name(tmp_path):
    path = tmp_path / "new" / "a.csv"
    writer = csv(path)
    event = StepEnd(step=12, position=5, epoch_length=10, time=3.25, metrics={})
    writer.write(12, {"loss": 0.5, "n": np.int64(7), "flag": True, "t": torch.tensor(0.25)}, event)
    writer.write(12, {"eval": 1}, EvalEnd(step=12, time=4.5, metrics={}))
    writer.write_scalars(13, {"late": 2.0})
    writer.write_scalars(13, {"loss": np.float32(0.5)})
    writer.flush()
    assert path.read_text().splitlines() == [
        "step,epoch,time,loss,n,flag,t,eval,late",
        "12,0.5,3.25,0.5,7,1,0.25,,",
        "12,,4.5,,,,,1,",
        "13,,,,,,,,2.0",
        "13,,,0.5,,,,,",
    ]
    assert read_csv(path) == [
        {"step": 12, "epoch": 0.5, "time": 4.5, "loss": 0.5, "n": 7, "flag": 1, "t": 0.25, "eval": 1},
        {"step": 13, "loss": 0.5, "late": 2.0},
    ]
    writer.close()


def test_csv_header_is_written_with_the_first_row(tmp_path):
    path = tmp_path / "a.csv"
    first, other = csv(path), csv(path)  # other ranks also create the writer, and never use it
    assert path.read_bytes() == b""
    first.write_scalars(1, {"time": 2.0})
    first.write_scalars(2, {"loss": 0.25})
    for writer in (first, other):
        writer.close()
    assert path.read_text() == "step,epoch,time,loss\n1,,2.0,\n2,,,0.25\n"


def test_csv_round_trips_non_finite_and_large_scalars(tmp_path):
    values = {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 1e-300, "e": 2**70, "f": 0.1 + 0.2}
    writer = csv(tmp_path / "a.csv")
    writer.write_scalars(1, values)
    writer.close()
    (row,) = table(tmp_path / "a.csv")
    assert math.isnan(float(row["a"]))
    assert [float(row[name]) for name in "bcdf"] == [values[name] for name in "bcdf"]
    assert int(row["e"]) == 2**70


NAMES = ["a,b", 'say "x"', "two\nlines", "\r", " spaced ", "wörld", "", "=1+1", '"']


def test_csv_names_may_have_any_characters(tmp_path):
    for count, name in enumerate(NAMES):
        writer = csv(tmp_path / "a.csv")
        writer.purge(count)
        writer.write_scalars(count + 1, {name: float(count)})
        writer.write_scalars(count + 1, {name: count + 0.5})
        writer.close()
    assert read_csv(tmp_path / "a.csv") == [{"step": count + 1, name: count + 0.5} for count, name in enumerate(NAMES)]
    assert len(table(tmp_path / "a.csv")) == 2 * len(NAMES)


def test_csv_values_may_set_epoch_but_not_step(tmp_path):
    writer = csv(tmp_path / "a.csv")
    writer.write(1, {"epoch": 7}, StepEnd(step=1, position=5, epoch_length=10, time=3.0, metrics={}))
    with pytest.raises(ValueError, match=r"expected names other than 'step', the step column of"):
        writer.write_scalars(2, {"step": 9, "loss": 1.0})
    writer.close()
    assert table(tmp_path / "a.csv") == [{"step": "1", "epoch": "7", "time": "3.0"}]


WHOLE = b'step,epoch,time,"two\nlines",loss\n1,,,0.5,1.5\n2,,,0.5,2.5\n3,0.25,1.5,,3.5\n'
HEADER = WHOLE.index(b"1,,,")


@pytest.mark.parametrize("cut", range(len(WHOLE) + 1))
def test_csv_repairs_a_row_torn_at_any_byte(tmp_path, cut, recwarn):
    path = tmp_path / "a.csv"
    path.write_bytes(WHOLE[:cut])
    writer = csv(path)
    whole = WHOLE[:cut].rfind(b"\n") + 1 if cut >= HEADER else 0
    assert [str(w.message) for w in recwarn] == (
        [
            f"{path} ended in the middle of a row, possibly after a crash. Its last {cut - whole} bytes "
            "were moved to a.csv.damaged."
        ]
        if cut > whole
        else []
    )
    writer.write_scalars(3, {"loss": 9.5})
    writer.write_scalars(9, {"new": 1})
    writer.close()
    found = read_csv(path)
    assert [row["step"] for row in found] == [
        *range(1, min(max(WHOLE[HEADER:cut].count(b"\n"), 0), 2) + 1),
        3,
        9,
    ]
    assert found[-2]["loss"] == 9.5
    assert found[-2].get("time") == (1.5 if cut == len(WHOLE) else None)


@pytest.mark.parametrize(
    "content",
    [b"a,b\n1,2\n", b"a,b\n1,2", b"text", b"step;epoch;time\n", b"\xff\xfe\0", b"step,time,epoch\n1,2,3\n", b"\n"],
)
def test_csv_rejects_a_foreign_table_unchanged(tmp_path, content, recwarn):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected the columns of .*a.csv to begin with .* Use another path"):
        csv(path)
    assert path.read_bytes() == content
    assert not recwarn


def test_csv_appends_to_a_file_saved_by_a_spreadsheet(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'step,epoch,time,loss\r\n1,,,"1.5"\r\n2,,,2.5\r\n')
    writer = csv(path)
    writer.write_scalars(2, {"loss": 2.75})
    writer.write_scalars(3, {"loss": 3.5})
    writer.close()
    assert [(row["step"], row["loss"]) for row in read_csv(path)] == [(1, 1.5), (2, 2.75), (3, 3.5)]


def filled(path, steps=5):
    writer = csv(path)
    for step in range(1, steps + 1):
        writer.write_scalars(step, {"loss": float(step)})
    return writer


@pytest.mark.parametrize("reopened", [False, True])
def test_csv_purge_abandons_later_rows_and_keeps_all_rows(tmp_path, reopened):
    path = tmp_path / "a.csv"
    writer = filled(path)
    if reopened:
        writer.close()
        writer = csv(path)
    for _ in range(2):
        writer.purge(3)
        assert [row["step"] for row in read_csv(path)] == [1, 2, 3]
        assert table(path)[5:] == [{"step": "3"}]
    writer.write_scalars(3, {"eval": 0.5})
    writer.write_scalars(4, {"loss": 40.0})
    writer.purge(4)
    writer.close()
    assert read_csv(path)[2:] == [{"step": 3, "loss": 3.0, "eval": 0.5}, {"step": 4, "loss": 40.0}]
    csv(path).purge(0)
    assert read_csv(path) == []
    assert len(table(path)) == 9


def test_csv_reader_skips_damaged_rows(tmp_path):
    path = tmp_path / "a.csv"
    filled(path, 2).close()
    path.write_bytes(path.read_bytes() + b"\0\0\0\0\n\xff,,,\n1.5,,,\n,,,\n2,,,x\n3,,,3.0\n4,,,4.")
    assert [row["step"] for row in read_csv(path)] == [1, 2, 3, 4]
    with pytest.warns(RuntimeWarning, match="middle of a row"):
        writer = csv(path)
    writer.purge(2)
    writer.write_scalars(3, {"new": 1.0})  # rewrites the file
    writer.close()
    assert read_csv(path)[2:] == [{"step": 3, "new": 1.0}]


def test_csv_rewrites_the_file_only_for_new_columns(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("fxtrain.writers._csv_rows.replace_file", lambda *a: (calls.append(1), replace_file(*a)))
    writer = filled(tmp_path / "a.csv")
    assert len(calls) == 1
    writer.write_scalars(6, {f"m{index}": 1.0 for index in range(100)})
    assert len(calls) == 2
    writer.purge(5)
    writer.flush()
    writer.write_scalars(5, {"loss": 1.0})
    assert len(calls) == 2
    writer.close()


def test_csv_survives_a_crash_during_a_rewrite(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    writer = filled(path)
    before = path.read_bytes()

    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", crash)
        with pytest.raises(KeyboardInterrupt):
            writer.write_scalars(6, {"new": 1.0})
    assert path.read_bytes() == before
    writer.write_scalars(5, {"loss": 50.0})
    writer.write_scalars(6, {"new": 1.0})
    writer.close()
    assert [row["step"] for row in read_csv(path)] == [1, 2, 3, 4, 5, 6]
    assert read_csv(path)[4:] == [{"step": 5, "loss": 50.0}, {"step": 6, "new": 1.0}]


@settings(deadline=None, max_examples=40)
@given(
    sessions=st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from(["a", "b,c", 'd"', "e\nf"]), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_csv_has_one_row_per_step_after_restarts_and_purges(tmp_path_factory, sessions):
    path = tmp_path_factory.mktemp("law") / "a.csv"
    expected, last, writer = {}, 0, csv(path)
    for number, (back, steps, name, reopened) in enumerate(sessions):
        begin = max(last - back, 0)
        if reopened:
            writer.close()
            writer = csv(path)
        writer.purge(begin)
        expected = {step: row for step, row in expected.items() if step <= begin}
        for step in range(begin + 1, begin + steps + 1):
            for value in ({"session": number}, {name: float(step)}):
                writer.write_scalars(step, value)
            expected[step] = {"step": step, "session": number, name: float(step)}
        last = begin + steps
    writer.close()
    assert read_csv(path) == list(expected.values())


def test_csv_rejects_an_unwritable_path_on_construction(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"csv cannot write to .*file.a.csv \(.*Use a writable path"):
        csv(tmp_path / "file" / "a.csv")
    with pytest.raises(OSError, match="Is a directory"):
        csv(tmp_path)


# Replacement of files


def test_replace_file_is_atomic_and_ignores_leftovers(tmp_path):
    (tmp_path / "a.tmp").write_bytes(b"torn")
    replace_file(tmp_path / "a", b"one")
    replace_file(tmp_path / "a", b"two")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"two"


@pytest.mark.parametrize(("make", "read"), [(csv, read_csv), (jsonl, read_jsonl)])
def test_complex_scalars_are_refused_and_nothing_is_written(make, read, tmp_path):
    writer = make(tmp_path / "a")
    writer.write_scalars(1, {"loss": 1.0})
    with pytest.raises(TypeError, match=r"expected a scalar to write to be a real number, got .*complex"):
        writer.write_scalars(2, {"loss": torch.tensor(1 + 2j)})
    writer.close()
    assert [record["step"] for record in read(tmp_path / "a")] == [1]
