"""The HTML report and TensorBoard show every kind of value of a run, rendered in a browser."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
import warnings

import pytest
import torch
from browser import chromium, needs_chromium
from matplotlib.figure import Figure as Canvas
from sklearn.datasets import load_digits
from torch import nn

import fxtrain as fx
from fxtrain import callbacks as cb
from fxtrain import cli, observers, values, writers
from fxtrain.report import Mark, Run, page

LABELS = tuple(map(str, range(10)))
CONFIG = {"batch": 64, "optim": {"name": "adam", "learning_rate": 3e-3}, "clip": 1.0, "augment": False}


# Positions of the two spoiled batches, and the last steps of the two sessions.
NOT_FINITE, FAR_OFF, CUT, STEPS = 33, 80, 60, 160


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.hidden = nn.Linear(8 * 16, 32)
        self.out = nn.Linear(32, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.conv(x).relu(), 2)
        return self.out(self.hidden(x.flatten(1)).relu())


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def measure(model, batch):
    logits = model(batch["x"])
    loss = nn.functional.cross_entropy(logits, batch["y"])
    return (loss, {"accuracy": (logits.argmax(-1) == batch["y"]).float().mean()}), logits


def loss_fn(model, batch):
    return measure(model, batch)[0]


def made(model, key):
    """Returns one value of each kind."""
    filters = model.conv.weight
    filters = (filters - filters.amin()) / (filters.amax() - filters.amin())
    canvas = Canvas(figsize=(4, 3))
    canvas.subplots().bar(range(32), model.hidden.bias.detach())
    time = torch.arange(4000) / 8000
    noise = fx.rng.uniform(key, (2, 6, 16, 16, 3))
    return {
        "filters": values.Image(filters, layout="CHW"),
        "noise": values.Video(noise, fps=6),
        "tone": values.Audio(0.5 * torch.sin(2 * torch.pi * 440 * time), 8000),
        "biases": values.Figure(canvas),
        "embedding": values.PointCloud(model.out.weight.T[:, :3].float().contiguous()),
        "note": values.Text(
            "# What the model *says*\n\nThe **least** sure digits:\n\n| digit | share |\n| --- | --- |\n| 3 | 0.41 |\n"
            "| 8 | 0.38 |\n\n- one `item`\n- another &lt;item&gt;\n"
        ),
    }


def train(folder, *, steps, resume=False):
    """Trains on scikit-learn's digits with a NaN batch and an outlier batch, and writes all outputs to ``folder``."""
    tx = fx.optim.chain(
        fx.optim.clip_by_global_norm(1.0),
        fx.optim.inject_hyperparams(fx.optim.adam)(learning_rate=fx.schedules.cosine(3e-3, 400)),
    )
    traced = fx.compose(
        cb.nan_guard(),
        cb.spike_guard("loss", deviations=8.0, window=20, warmup=10, rewind=5),
        cb.grad_norms(layer="*", publish=fx.every(5)),
        cb.grad_flow(layer="*", publish=fx.every(5)),
        cb.update_ratios(publish=fx.every(5)),
        cb.watch(every=10),
    )
    looped = fx.compose(
        cb.early_stopping("loss", patience=3),
        cb.restore_best("loss"),
        cb.stop_at("accuracy", 0.84, mode="max"),
        cb.throughput(samples=64, every=10),
        cb.confusion_matrix(10, labels=LABELS),
        cb.curves(10, labels=LABELS),
        cb.predictions(lambda batch: values.Image(batch["x"].clamp(0, 1), layout="CHW"), labels=LABELS, limit=12),
        cb.samples(made),
        fx.when(fx.every(25), cb.save()),
    )
    together = fx.compose(traced, looped)
    digits = load_digits()
    x, y = torch.from_numpy(digits.images[:, None] / 16).float(), torch.from_numpy(digits.target)
    train_data = fx.data.batches({"x": x[:1280], "y": y[:1280]}, 64)

    def spoiled(batch, position):
        scale = {NOT_FINITE: float("nan"), FAR_OFF: 30.0}.get(position, 1.0)
        return {"x": scale * batch["x"], "y": (batch["y"] + (position == FAR_OFF)) % 10}

    data = [spoiled(train_data[i], i) for i in range(STEPS)]
    checkpointer = fx.checkpointer(folder / "checkpoints", keep=10)
    with open(folder / "summary.txt", "w") as page:
        return fx.fit(
            fx.init(net(), tx),
            fx.train_step(loss_fn, tx, callbacks=traced),
            data,
            steps=steps,
            callbacks=together,
            eval_step=fx.eval_step(measure, outputs=True),
            eval_data=fx.data.batches({"x": x[1280:], "y": y[1280:]}, 128, shuffle=False, drop_last=False),
            eval_when=fx.every(30),
            checkpointer=checkpointer,
            resume=resume,
            snapshot_every=5,
            observers=[
                observers.write(
                    writers.jsonl(folder / "metrics.jsonl"),
                    writers.csv(folder / "metrics.csv"),
                    writers.media(folder / "media"),
                    writers.tensorboard(folder / "tensorboard"),
                    hparams=CONFIG,
                ),
                observers.record_run(folder, CONFIG),
                observers.record_code(folder, source=folder),
                observers.summary(file=page),
            ],
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two sessions, with its report."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* does not store ", RuntimeWarning)  # no writer stores every kind
        assert train(folder, steps=CUT).reason == f"reached {CUT} steps"
        assert train(folder, steps=STEPS, resume=True).reason == "accuracy reached 0.84"
    assert cli.main(["report", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


# The report

DRAW_ALL = """(async () => {
    panels.forEach(each => { each.visible = true; each.draw(); });
    await new Promise(requestAnimationFrame);  // plots are drawn after the script
    const isDrawn = ({plot: {ctx, bbox}}) =>
        ctx.getImageData(bbox.left, bbox.top, bbox.width, bbox.height).data.some(value => value > 0);
    const limits = panels.flatMap(({plot: {scales}}) => [scales.x.min, scales.x.max, scales.y.min, scales.y.max]);
    return panels.every(isDrawn) && limits.every(Number.isFinite) ? panels.length : panels.map(isDrawn);
})()"""
"""Draws all panels, and returns their number if each has a drawing and finite limits."""


def press(browser, key, panel=0):
    browser.value(f"document.querySelectorAll('.plot')[{panel}].focus()")
    browser.value(
        f"document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}}))"
    )


@pytest.fixture(scope="module")
def report(run):
    return (run / "report.html").as_uri()


@needs_chromium
class TestReport:
    def test_all_panels_marks_and_images_are_shown(self, browser, report):
        browser.open(report)
        titles = browser.value("[...document.querySelectorAll('.chart h3')].map(title => title.textContent)")
        assert titles[:4] == ["loss", "accuracy", "learning_rate", "curves"]  # the most important ones first
        assert {"grad_flow: layers", "grad_norm by layer", "grad_norm"} < set(titles)
        assert {"nan_guard/skipped", "throughput/samples_per_second", "histograms/weights/out.weight"} < set(titles)
        assert browser.value("panels.filter(each => each.plot).length") < len(titles)  # others are below the window
        assert browser.value(DRAW_ALL) == len(titles)
        shown = browser.value("visibleMarks().map(mark => mark.kind)")
        assert {"rewound", "resumed", "improved", "saved", "stopped"} <= set(shown)
        sections = browser.value("[...document.querySelectorAll('h2')].map(title => title.textContent)")
        assert sections[:5] == ["Curves", "Samples", "Confusion", "Tables", "Texts"]
        assert sections[-2:] == ["Events", "Summary"]
        browser.wait_for("[...document.images].every(image => image.complete)")
        assert browser.value("document.images.length") > 50
        assert browser.value("[...document.images].every(image => image.naturalWidth > 0)")
        assert browser.value("document.querySelector('audio').src.startsWith('data:audio/wav')")
        assert browser.value("document.querySelector('.text strong').textContent") == "least"
        assert browser.errors == []

    @pytest.mark.parametrize("width", [360, 390, 800, 1200])
    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    def test_page_fits_window_width(self, browser, report, width, dark):
        browser.open(report, width=width, dark=dark)
        assert browser.value("document.documentElement.scrollWidth") <= width
        # Elements in ``.wide`` may overflow, because they scroll.
        beyond = (
            "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        )
        assert browser.value(f"{beyond}.filter(e => !e.closest('.wide')).map(e => e.outerHTML.slice(0, 80))") == []
        background = browser.value("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") is not dark
        assert browser.errors == []

    def test_tools_change_charts(self, browser, report):
        browser.open(report)
        limits = "{const {x, y} = panels[0].plot.scales; [x.min, x.max, y.min, y.max]}"
        steps = browser.value(limits)
        browser.value("document.querySelectorAll('#tools input[type=checkbox]')[1].click()")
        assert browser.value(limits)[3] > steps[3]  # the outlier rescales the axis
        for unit, most in (("epoch", 10), ("time", 1000)):
            browser.value(
                "{const select = document.querySelector('#tools select');"
                f"select.value = '{unit}'; select.dispatchEvent(new Event('change'))}}"
            )
            assert 0 <= browser.value(limits)[0] < browser.value(limits)[1] < most
        marks = "visibleMarks().filter(mark => mark.kind === 'improved').length"
        assert browser.value(marks) > 0
        find = "[...document.querySelectorAll('#tools label')].find(label => label.textContent.includes('improved'))"
        browser.value(f"{find}.click()")
        assert browser.value(marks) == 0
        figures = "[...document.querySelector('.steps').children].map(figure => figure.hidden)"
        assert browser.value(figures)[-1] is False
        browser.value(
            "{const slider = document.querySelector('.choose input'); slider.value = 0;"
            "slider.dispatchEvent(new Event('input'))}"
        )
        assert [hidden for hidden in browser.value(figures) if not hidden] == [False]
        assert browser.value(figures)[0] is False
        assert browser.errors == []

    def test_crosshair_zoom_and_enlargement_follow_keys(self, browser, report):
        browser.open(report)
        shown = "panels[0].box.querySelector('.tip').innerText"
        for _ in range(3):
            press(browser, "ArrowRight")
        assert re.match(r"step 4, epoch 0\.025, [\d.]+ s\n+train [\d.]+\n+eval [\d.]+ at step 30", browser.value(shown))
        press(browser, "+")
        low, high = browser.value("view.range")
        assert low < 4 < high < 100
        assert browser.value("panels[1].plot.scales.x.max") == high  # all panels zoom
        browser.value("document.getElementById('whole').click()")
        assert browser.value("panels[1].plot.scales.x.max") > 100
        press(browser, "Enter")
        assert browser.value("document.querySelector('dialog .chart canvas').clientHeight") > 400
        browser.value("document.querySelector('dialog .close').click()")
        browser.wait_for("!document.querySelector('dialog')")
        browser.value("panels[0].box.querySelector('.legend button').click()")  # hides the first curve
        assert browser.value("panels[0].plot.series.length") == 2
        assert browser.errors == []

    def test_values_and_pictures_are_downloaded(self, browser, report):
        browser.open(report)
        browser.value(
            "URL.createObjectURL = blob => { window.blob = blob; return ''; };"
            "HTMLAnchorElement.prototype.click = function() {"
            "    window.blob.text().then(text => { window.saved = [this.download, text]; }); }"
        )
        browser.value("document.querySelectorAll('.head button')[0].click()")
        browser.wait_for("window.saved")
        name, text = browser.value("window.saved")
        head, first, *_ = text.splitlines()
        assert (name, head) == ("loss.csv", '"run","metric","step","epoch","seconds","value"')
        assert re.fullmatch(r'"digits","loss train",1,0\.00625,[\d.]+,[\d.]+', first)
        browser.value("window.saved = null; document.querySelectorAll('.head button')[1].click()")
        browser.wait_for("window.saved")
        assert browser.value("window.saved[0]") == "loss.png"
        assert browser.value("window.saved[1].length") > 5000
        histogram = "panels.find(each => each.box.textContent.includes('weights/out.weight'))"
        browser.value(f"window.saved = null; {histogram}.box.querySelector('.head button').click()")
        browser.wait_for("window.saved")
        assert re.match(r'"run","histogram","step","from","to","count"\n"digits",', browser.value("window.saved[1]"))
        assert browser.value("quoted('=1+1') + quoted('a\"b') + quoted(-1)") == '"\'=1+1""a""b"-1'
        assert browser.errors == []

    def test_runs_share_panels_with_one_color_each(self, browser, run, tmp_path):
        again = tmp_path / "again"
        again.mkdir()
        shutil.copy(run / "metrics.jsonl", again)
        assert cli.main(["report", str(run), str(again), "--out", str(tmp_path / "page.html")]) == 0
        browser.open((tmp_path / "page.html").as_uri())
        assert browser.value(DRAW_ALL) == len(browser.value("data.sections.flatMap(s => s.panels)")) + browser.value(
            "data.histograms.length"
        )
        legend = (
            "[...panels[0].box.querySelectorAll('.legend button')].map(e => [e.textContent, e.firstChild.style.color])"
        )
        found = browser.value(legend)
        assert [re.sub("[\\d.]+$", "", text) for text, _ in found] == [
            f"{name}, {kind}" for kind in ("train", "eval") for name in ("digits", "again")
        ]
        assert found[0][1] == found[2][1] != found[1][1] == found[3][1]
        find = "[...document.querySelectorAll('#tools label')].find(label => label.textContent.includes('again'))"
        browser.value(f"{find}.click()")
        assert browser.value("panels[0].plot.series.length") == 3
        assert browser.errors == []

    def test_hostile_names_and_extreme_values_run_no_code(self, browser, tmp_path):
        bad = "</script><img src=x onerror=window.taken=1><script>window.taken=1</script>"
        rows = {0: (1e308, 1e300), 1: (-1e308, 1.000001e300), 2: (5e-324, "NaN"), 2**50 - 1: ("NaN", 0), 2**50: (3, -1)}
        with open(tmp_path / "metrics.jsonl", "w") as file:
            for step, (loss, other) in rows.items():
                names = dict.fromkeys((bad, "__proto__", "constructor", "", "huge"), 1.0)
                line = {"step": step, "metrics": {"train/loss": loss, "eval/loss": other, **names}}
                line["texts"] = {bad: f"{bad}\n\n[x](javascript:window.taken=1) ![y](http://127.0.0.1:1/x.png)"}
                line["histograms"] = {bad: {"counts": [1e15, 0], "edges": [-1e300, 0, 1e300]}}
                line["tables"] = {bad: {bad: [bad]}}
                line["confusion"] = {bad: {"labels": [bad], "counts": [[1e15]]}}
                file.write(json.dumps(line) + "\n")
            file.write(json.dumps({"step": 2**50, "metrics": {"late": 1.0}}) + "\n")
        with open(tmp_path / "events.jsonl", "w") as file:
            file.write(json.dumps({"event": "StepEnd", "step": 1, "asked": {"stop": [bad]}}) + "\n")
        assert cli.main(["report", str(tmp_path)]) == 0
        browser.open((tmp_path / "report.html").as_uri())
        for tool in range(3):
            browser.value(f"document.querySelectorAll('#tools input[type=checkbox]')[{tool}].click()")
        assert browser.value(DRAW_ALL) == 8
        assert browser.value("window.taken === undefined")
        assert browser.errors == []

    def test_content_policy_blocks_injected_code(self, browser, tmp_path):
        html = page(Run("run", {"loss": ([1, 2], [1.0, 2.0])}, [], {}, {}, {}, {}, {}, {}, [], "", {}))
        taken = "<script>window.taken = 1</script><img src=x onerror='window.taken = 1'>"
        (tmp_path / "page.html").write_text(html.replace("</main>", f"</main>{taken}"))
        browser.open((tmp_path / "page.html").as_uri())
        assert browser.value(DRAW_ALL) == 1
        assert browser.value("window.taken === undefined")
        assert len(browser.errors) >= 2

    def test_long_run_is_drawn_quickly(self, browser, tmp_path):
        steps = list(range(1, 100_001))
        curves = {f"grad_norm/layer{i}": (steps, [(step * 7919 % 1000) / 1000 for step in steps]) for i in range(20)}
        marks = [Mark(step, kind, "so it was") for step in steps[::100] for kind in ("saved", "improved", "skipped")]
        run = Run("long", curves, marks, {}, {}, {}, {}, {}, {}, [], "", {})
        (tmp_path / "long.html").write_text(page(run))
        assert (tmp_path / "long.html").stat().st_size < 2**20
        browser.open((tmp_path / "long.html").as_uri())
        assert browser.value(DRAW_ALL) == 3
        assert browser.value("{const begin = performance.now(); redraw(); performance.now() - begin}") < 5000
        assert browser.errors == []


# TensorBoard


@contextlib.contextmanager
def tensorboard_of(folder):
    """Starts TensorBoard on a free port and yields its address."""
    options = ["--logdir", str(folder), "--port", "0", "--host", "127.0.0.1", "--load_fast", "false"]
    command = [sys.executable, "-m", "tensorboard.main", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"at (http://\S+?)/? ", line):
                yield found[1]
                return
        raise AssertionError("".join(said))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def asked(address, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/data/plugin/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


NAME = "digits/tensorboard"


@pytest.fixture(scope="module")
def board(run):
    pytest.importorskip("tensorboard")
    with tensorboard_of(run.parent) as address:
        end = time.monotonic() + 60
        while "curves/auc" not in asked(address, "scalars/tags").get(NAME, {}):  # a tag of the last event
            assert time.monotonic() < end, "TensorBoard has not read the run."
            time.sleep(0.2)
        yield address


@pytest.mark.slow
class TestTensorBoard:
    def test_every_kind_of_value_has_its_tags(self, board):
        def tags(kind):
            return set(asked(board, f"{kind}/tags")[NAME])

        assert {"train/loss", "eval/accuracy", "grad_norm/total", "train/learning_rate"} < tags("scalars")
        assert {"curves/roc", "confusion_matrix", "samples/noise/1", "samples/biases"} < tags("images")
        assert {"histograms/grads/out.bias", "histograms/weights/conv.weight"} < tags("histograms")
        assert tags("text") == {"samples/note", "predictions"}
        assert tags("audio") == {"samples/tone"}
        assert tags("mesh") == {"samples/embedding"}

    def test_rewound_and_resumed_run_has_one_point_per_step(self, board):
        points = asked(board, f"scalars/scalars?run={NAME}&tag=train/loss")
        steps = [step for _, step, _ in points]
        assert steps == list(range(1, steps[-1] + 1))
        assert steps[-1] > FAR_OFF

    def test_histogram_range_fits_values(self, board):
        (*_, (_, _, buckets)) = asked(board, f"histograms/histograms?run={NAME}&tag=histograms/weights/out.weight")
        assert -1 <= buckets[0][0] < 0 < buckets[-1][1] <= 1  # the bins span -100 to 100

    def test_texts_and_tables_are_rendered(self, board):
        (*_, note) = asked(board, f"text/text?run={NAME}&tag=samples/note")
        assert "<strong>least</strong>" in note["text"]
        assert "<td>0.41</td>" in note["text"]
        assert "<li>another &lt;item&gt;</li>" in note["text"]
        (*_, table) = asked(board, f"text/text?run={NAME}&tag=predictions")
        assert "<th>confidence</th>" in table["text"]

    def test_hyperparameters_are_listed_with_last_metrics(self, board):
        statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
        request = {"experimentName": "", "allowedStatuses": statuses, "colParams": [], "startIndex": 0, "sliceSize": 9}
        (group,) = asked(board, "hparams/session_groups", request)["sessionGroups"]
        assert group["hparams"]["optim/learning_rate"] == 3e-3
        assert group["hparams"]["augment"] is False
        values = {each["name"]["tag"]: each["value"] for each in group["metricValues"]}
        (*_, (_, _, accuracy)) = asked(board, f"scalars/scalars?run={NAME}&tag=eval/accuracy")
        assert values["eval/accuracy"] == accuracy > 0.8

    @needs_chromium
    @pytest.mark.parametrize(
        ("tab", "texts"),
        [
            ("timeseries", ["confusion_matrix", "curves/auc"]),
            ("images", ["confusion_matrix", "curves/roc"]),
            ("histograms", ["histograms/grads/conv.bias"]),
            ("text", ["What the model says", "0.41", "confidence"]),
            ("hparams", ["optim/learning_rate", "adam", "eval/accuracy"]),
        ],
    )
    def test_tabs_show_values(self, browser, board, tab, texts):
        # TensorBoard nests components, each with its own shadow root.
        everything = (
            "(function all(node) { return [...node.childNodes].map(child => child.nodeType === 3 ? child.data : "
            "(child.shadowRoot ? all(child.shadowRoot) : '') + all(child)).join('') })(document.body)"
        )
        browser.open(f"{board}/?{tab}#{tab}")
        browser.wait_for(f"{json.dumps(texts)}.every(text => {everything}.includes(text))")
