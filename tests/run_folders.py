"""Run folders as their writers and observers leave them, and the data of their report's page."""

import json
import re

from fxtrain import FitBegin, observers, writers
from fxtrain.core import Control
from fxtrain.report import read_run


def data(html):
    """The data embedded for the page's script."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def panels(html):
    return {panel["title"]: panel["series"] for section in data(html)["sections"] for panel in section["panels"]}


def measured(folder, losses, **more):
    """Writes losses by step, and other values at the last step."""
    writer = writers.jsonl(folder / "metrics.jsonl")
    for step, loss in losses.items():
        writer.write_scalars(step, {"train/loss": loss})
    writer.write(max(losses, default=0), more)
    writer.close()


def session(folder, *events, begin=0, config=None):
    """Records a session of a run from pairs of an event and its control."""
    observer = observers.record_run(folder, config)
    observer(None, FitBegin(step=begin, resumed=begin > 0), Control())
    for event, control in events:
        observer(None, event, control)
    observer.close()


def media_of(folder, values, steps=(10,)):
    writer = writers.media(folder / "media")
    for step in steps:
        writer.write(step, values)
    measured(folder, {1: 1.0})
    return read_run(folder)
