"""The report of several runs, and the command that writes reports."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from run_folders import data, measured, media_of, panels, session

from fxtrain import FitEnd, cli
from fxtrain.core import Control
from fxtrain.report import page, read_run
from fxtrain.values import Image, Table, Text

pytestmark = pytest.mark.usefixtures("without_pyav")  # videos are GIFs


# Several runs


def compared(folder, *names):
    """Records runs with different learning rates and returns them."""
    runs = []
    for index, name in enumerate(names):
        run = folder / name
        measured(run, {1: 3.0 - index, 2: 2.0 - index}, **{"eval/loss": 1.0 - index, "lr": 0.1, f"own/{index}": 1.0})
        session(run, (FitEnd(step=2, reason="done"), Control()), config={"lr": 10.0**-index, "model": {"layers": 2}})
        bits = {"this model": 3.0 - index, "xz": 1.5, "own": index}
        (run / "result.json").write_text(json.dumps({"bits_per_byte": bits, "step": 2}))
        runs.append(read_run(run))
    return runs


def test_curves_of_several_runs_share_the_panel_of_their_metric(tmp_path):
    found = panels(page(*compared(tmp_path, "a", "b")))
    assert {title: [(series["run"], series["name"]) for series in lines] for title, lines in found.items()} == {
        "loss": [(0, "train"), (1, "train"), (0, "eval"), (1, "eval")],
        "lr": [(0, "lr"), (1, "lr")],
        "own/0": [(0, "own/0")],
        "own/1": [(1, "own/1")],
    }


def test_table_of_runs_has_their_best_metrics_and_states(tmp_path):
    html = page(*compared(tmp_path, "a", "b"))
    heads, *rows = re.findall("<tr>(.*?)</tr>", html.split('class="runs"')[1].split("</table>")[0])
    assert re.findall("<th>(.*?)</th>", heads) == ["run", "lowest eval/loss", "step", "status"]
    assert [re.findall("<td>(.*?)</td>", row) for row in rows] == [
        ["a", "1", "2", "done"],
        ["b", "<strong>0</strong>", "2", "done"],
    ]


def test_only_differing_configuration_is_compared(tmp_path):
    html = page(*compared(tmp_path, "a", "b"))
    shown = html.split("<h2>Differences</h2>")[1].split("</section>")[0]
    assert "<tr><td>lr</td><td>1</td><td>0.1</td></tr>" in shown
    assert "model" not in shown


def test_results_of_several_runs_are_bars_beside_their_common_baselines(tmp_path):
    def bars(html):
        return re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td><td><i( data-run=\"\d\")?", html)

    runs = compared(tmp_path, "a", "b")
    own = ' data-run="{}"'.format
    assert bars(page(runs[0])) == [("own", "0", ""), ("xz", "1.5", ""), ("this model", "3", own(0))]
    assert bars(page(*runs)) == [
        ("own", "0", ""),
        ("own, b", "1", ""),
        ("xz", "1.5", ""),
        ("b", "2", own(1)),
        ("a", "3", own(0)),
    ]
    assert "<h3>bits per byte</h3>" in page(*runs)


def test_samples_and_problems_name_their_run(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        media_of(tmp_path / name, {"digits": Image(torch.rand(4, 4, 1)), "few": Table({"x": [1]}), "said": Text("so")})
    (tmp_path / "b/run.json").write_text("{")
    html = page(read_run(tmp_path / "a"), read_run(tmp_path / "b"))
    for name in ("digits", "few", "said"):
        assert re.findall(f"<h3>{name} <small>(.)</small>", html) == ["a", "b"]
    assert "<li>b/run.json: expected JSON" in html


def test_runs_of_one_name_are_told_apart_by_their_parent_folder(tmp_path):
    runs = compared(tmp_path, "x/run", "y/run", "other")
    runs[2].about["name"] = "other <b>"
    assert [run["name"] for run in data(page(*runs))["runs"]] == ["x/run", "y/run", "other <b>"]
    assert [run["name"] for run in data(page(*runs[:1] * 3))["runs"]] == ["x/run", "x/run (2)", "x/run (3)"]


def test_number_of_runs_of_a_page_is_limited(tmp_path):
    (run,) = compared(tmp_path, "a")
    for runs in ((), (run,) * 51):
        with pytest.raises(ValueError, match=rf"expected from 1 to 50 runs, got {len(runs)}\. Choose fewer"):
            page(*runs)


def test_links_to_interactive_figures_are_relative_to_the_page(tmp_path):
    runs = compared(tmp_path, "a", "b")
    for run in runs:
        place = run.folder.root + "/media/drawn"
        os.makedirs(place)
        with open(place + "/00000001.html", "w") as file:
            file.write("figure")
    runs = [read_run(run.folder.root) for run in runs]

    def links(html):
        return re.findall('href="([^"#]*)"', html)

    assert links(page(runs[0])) == ["media/drawn/00000001.html"]
    assert links(page(*runs)) == ["a/media/drawn/00000001.html", "b/media/drawn/00000001.html"]
    assert links(page(runs[0], path=tmp_path / "pages/page.html")) == ["../a/media/drawn/00000001.html"]


# The command


def test_command_writes_the_page_to_the_run_folder_or_out(tmp_path, capsys):
    measured(tmp_path, {1: 1.0})
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").exists()


def test_command_writes_the_page_of_several_runs_to_the_current_folder(tmp_path, capsys, monkeypatch):
    compared(tmp_path, "runs/a", "runs/b")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the first page is not among the runs
        assert cli.main(["report", *map(str, (tmp_path / "runs").iterdir())]) == 0
        assert capsys.readouterr().out == "report.html\n"
    assert "<h1>2 runs</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_command_prints_errors_with_an_exit_code(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err == (
        f"fxtrain report: expected a run folder, got {tmp_path / 'nothing'} (No such file or directory). Check the "
        "path.\n"
    )
    assert cli.main(["report"]) == 2
    assert capsys.readouterr().err == "fxtrain report: expected the folder of a run, got none. Name at least one.\n"
    measured(tmp_path, {1: 1.0})
    page = tmp_path / "no" / "page.html"
    assert cli.main(["report", str(tmp_path), "--out", str(page)]) == 1
    assert capsys.readouterr().err == (
        f"fxtrain report: expected a writable path for the page, got {page} (No such file or directory). Choose "
        "another one with --out.\n"
    )


def test_command_exits_with_2_in_a_subprocess(tmp_path):
    done = subprocess.run([sys.executable, "-m", "fxtrain", "report", str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "got none of metrics.jsonl, metrics.csv" in done.stderr
