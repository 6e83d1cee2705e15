"""A recorded run, and a check of its report: a page that loads and runs nothing, or a one-line error."""

import contextlib
import html
import html.parser
import json
import re
import shutil
import signal

import pytest
import torch
from problem import data, eval_step, loss_fn, start, transform

import fxtrain as fx
from fxtrain import cli, observers, values, writers

SECRET = "the-content-of-a-file-outside-of-the-run"
SECONDS = 20  # for one page; a hang is a failure
STEPS = 6
TAGS = {"html", "head", "meta", "title", "style", "script", "body", "header", "main", "section", "div", "p", "small"}
TAGS |= {"h1", "h2", "h3", "h4", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "ul", "ol", "li"}
TAGS |= {"figure", "figcaption", "img", "audio", "video", "pre", "code", "em", "strong", "br", "hr", "blockquote"}
TAGS |= {"details", "summary", "i"}


def record(folder):
    """Records a short run with one value of each kind and the files of all observers."""

    def measure(state, event: fx.StepEnd):
        if event.step % 3:  # few files, because each test copies them
            return state, fx.Control(log={"monitor/improved_by": 0.5}, save=event.step == 4, reason="half of it")
        made = {
            "samples/image": values.Image(torch.rand(2, 4, 4, 1)),
            "samples/film": values.Video(torch.rand(2, 4, 4, 3)),
            "samples/glass": values.Video(torch.rand(2, 4, 4, 4)),  # with transparency, which only GIF has
            "samples/tone": values.Audio(torch.zeros(50), 8000),
            "samples/text": values.Text(f"# Step\n\n- **{event.step}**\n"),
            "samples/table": values.Table({"picture": values.Image(torch.rand(2, 4, 4, 1)), "name": ["a", "b"]}),
            "confusion": values.ConfusionMatrix(torch.ones(2, 2), labels=("cat", "dog")),
            "weights": values.Histogram(state.params["0.weight"]),
            "monitor/improved_by": 0.5,
        }
        return state, fx.Control(log=made)

    tx = transform()
    with open(folder / "summary.txt", "w") as summary:
        fx.fit(
            start(),
            fx.train_step(loss_fn, tx),
            data(),
            steps=STEPS,
            callbacks=[measure],
            eval_step=eval_step,
            eval_data=data(1),
            eval_when=fx.every(2),
            checkpointer=fx.checkpointer(folder / "checkpoints"),
            run=fx.RunInfo(name="a run"),
            observers=[
                observers.write(
                    writers.jsonl(folder / "metrics.jsonl"),
                    writers.csv(folder / "metrics.csv"),
                    writers.media(folder / "media"),
                    hparams={"lr": 0.1, "model": {"layers": 2}},
                ),
                observers.record_run(folder, {"lr": 0.1, "data": ["a", "b"]}),
                observers.record_code(folder, source=folder),
                observers.summary(file=summary),
            ],
        )
    (folder / "result.json").write_text(json.dumps({"loss": {"eval": 0.5}, "bits": {"this model": 0.5, "xz": 1}}))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "run"
    folder.mkdir()
    record(folder)
    return folder


# Checks of pages and errors


class Page(html.parser.HTMLParser):
    """Collects tags, scripts and attributes that could run or load something."""

    def __init__(self):
        super().__init__()
        self.tags, self.suspicious, self.scripts = set(), [], 0

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.scripts += tag == "script"
        for name, value in attributes:
            if name.startswith("on") or (name in ("src", "href") and not re.match(r"data:(image|audio|video)/", value)):
                self.suspicious.append((tag, name, value[:80]))


@contextlib.contextmanager
def within(seconds):
    def expired(number, frame):
        raise TimeoutError(f"no page after {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def strict(constant):
    raise AssertionError(f"{constant} is no JSON")


def report(folder, capsys, *others):
    """Runs the command on folders; returns the page and an empty error, or None and the error's line."""
    out = folder.parent / "page.html"
    out.unlink(missing_ok=True)
    with within(SECONDS):
        code = cli.main(["report", *map(str, (folder, *others)), "--out", str(out)])
    captured = capsys.readouterr()
    if code:
        assert code in (1, 2)
        assert captured.out == ""
        assert captured.err.startswith("fxtrain report: ")
        assert captured.err.count("\n") == 1
        assert not out.exists()
        return None, captured.err
    assert captured.err == ""
    text = out.read_bytes().decode("utf-8")
    found = Page()
    found.feed(text)
    assert found.tags <= TAGS
    assert found.suspicious == []
    assert found.scripts == 2
    assert SECRET not in text
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    json.loads(embedded, parse_constant=strict)
    return text, ""


def unread(text):
    """The problems that a page lists."""
    found = re.search(r"<h2>Problems</h2><ul>(.*?)</ul>", text, re.DOTALL)
    return re.findall("<li>(.*?)</li>", found[1], re.DOTALL) if found else []


@pytest.fixture
def run(original, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    return folder
