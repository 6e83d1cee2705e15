"""The records in a run's folder, read back as strict JSON."""

import json

import pytest

from fxtrain import observers
from fxtrain.core import Control

NOTHING = Control()


def lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


class Story:
    """The records in a run's folder."""

    def __init__(self, folder):
        self.folder = folder

    @property
    def run(self):
        return json.loads((self.folder / "run.json").read_text(), parse_constant=pytest.fail)

    @property
    def sessions(self):
        return self.run["sessions"]

    @property
    def events(self):
        return lines(self.folder / "events.jsonl")

    @property
    def names(self):
        return [line["event"] for line in self.events]

    def asked(self):
        return [(line["event"], line["step"], line["asked"]) for line in self.events if "asked" in line]

    def observer(self, config=None, events=(), **options):
        return observers.required(observers.record_run(self.folder, config, events=events, **options))


@pytest.fixture
def story(tmp_path):
    return Story(tmp_path / "deep" / "run")
