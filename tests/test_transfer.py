"""Transfers of scalars from a device to the host: lazy, and many at a time."""

import cuda_stand_ins
import pytest
import torch
from cuda_stand_ins import on_device

import fxtrain as fx
from fxtrain import observers
from fxtrain.core import Epoch, Logged
from fxtrain.loop import _transfer as transfers_of_run
from fxtrain.loop._publisher import Publisher
from fxtrain.loop._transfer import HostTransfer, start_copy, start_copy_of_flags


class Recorder:
    """A writer that records its points."""

    def __init__(self):
        self.points = []

    def write(self, step, values, event):
        self.points += [(step, name, value) for name, value in values.items()]

    def purge(self, step):
        self.points = [point for point in self.points if point[0] <= step]

    def flush(self):
        pass

    def close(self):
        pass


def steps_of(recorder):
    return [step for step, name, _ in recorder.points if name == "train/loss"]


@pytest.fixture
def transfers(monkeypatch):
    """The number of scalars in each transfer to the host."""
    counts = []
    real = transfers_of_run.start_copy

    def counted(values):
        if values:
            counts.append(len(values))
        return real(values)

    monkeypatch.setattr(transfers_of_run, "start_copy", counted)
    return counts


def average(value):
    return fx.metrics.Average.from_model_output(values=torch.tensor([value]))


def test_first_read_transfers_all_pending_values(transfers):
    transfer = HostTransfer()
    several = [transfer.metrics({"loss": average(float(i)), "n": torch.tensor(i)}) for i in range(5)]
    log = transfer.log({"on": Logged(torch.tensor(7.0)), "off": Logged(torch.tensor(8.0), when=torch.tensor(False))})
    assert transfers == []
    assert dict(several[2]) == {"loss": 2.0, "n": 2}
    assert [dict(each)["loss"] for each in several] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert list(log) == ["on"]
    assert transfers == [5 * 2 + 4]


def test_released_values_are_not_transferred(transfers):
    transfer = HostTransfer()
    for i in range(1000):
        kept = transfer.metrics({"n": torch.tensor(i)})
    assert dict(kept) == {"n": 999}
    assert transfers == [1]


def test_invalid_metric_raises_only_when_read():
    transfer = HostTransfer()
    good, bad = transfer.metrics({"n": torch.tensor(1)}), transfer.metrics({"n": torch.zeros(3)})
    assert dict(good) == {"n": 1}
    with pytest.raises(TypeError, match=r"shape \[3\]"):
        dict(bad)


def test_points_of_many_steps_use_one_transfer(transfers):
    recorder = Recorder()
    publish = Publisher([observers.write(recorder, every=10)], torch.device("cuda"))
    for step in range(1, 21):
        # Like a scalar on a device, an average is read later.
        mean = fx.metrics.Average.from_model_output(values=torch.tensor([float(step)]))
        event = fx.StepEnd(step=step, time=0.0, metrics={"loss": mean, "mean": mean})
        publish(None, event, fx.Control(), Epoch(done=0, start=0, length=0))
    assert transfers == []
    publish.close()
    assert [step for step, name, _ in recorder.points if name == "train/mean"] == [10, 20]
    assert publish.history["train/mean"].values.tolist() == list(range(1, 21))
    assert transfers == [20 * 2]  # two scalars per step, shared by the writer and the history


def test_transfer_overlaps_with_the_next_points(monkeypatch):
    acts = []
    real = transfers_of_run.start_copy

    def told(values):
        if not values:
            return real(values)
        acts.append("sent")
        arrived = real(values)
        return lambda: (acts.append("waited"), arrived())[1]

    monkeypatch.setattr(transfers_of_run, "start_copy", told)
    transfer, recorder = HostTransfer(), Recorder()
    observer = observers.write(recorder)
    for step in range(1, 65 + 128):
        log = transfer.log({"half": Logged(torch.tensor(step / 2), when=torch.tensor(step % 2 == 0))})
        event = fx.StepEnd(step=step, time=0.0, metrics=transfer.metrics({"loss": torch.tensor(float(step))}))
        observer(None, event, fx.Control().with_log(log))
        if step in (63, 64, 128, 192):
            acts.append(step)
    assert acts == [63, "sent", 64, "sent", "waited", 128, "sent", "waited", 192]
    assert steps_of(recorder) == list(range(1, 129))
    observer.close()
    assert [(step, value) for step, name, value in recorder.points if name == "train/loss"] == [
        (step, float(step)) for step in range(1, 193)
    ]
    assert [step for step, name, _ in recorder.points if name == "half"] == list(range(2, 193, 2))


class OnDevice(torch.Tensor):
    """A host tensor that claims to be on a device."""

    is_cpu = False


def test_scalars_of_a_device_keep_their_types():
    given = [torch.tensor(value).as_subclass(OnDevice) for value in (True, 0.5, 3, 2**60, False)]
    found = start_copy([given[0], "text", torch.zeros(3), *given[1:], torch.tensor(7)])()
    assert [value for value in found if not isinstance(value, torch.Tensor)] == [True, "text", 0.5, 3, 2**60, False, 7]
    assert [type(value) for value in found if type(value) is not torch.Tensor] == [
        *(bool, str, float, int, int, bool, int)
    ]


class TestStreams:
    """Transfers from a GPU, by stand-ins for streams and events.

    A read must wait for the event after its own copies, and not for the kernels of later steps. Doubts: the first
    allocation of pinned memory may synchronize with the device, and a later one asks the driver whether earlier copies
    are done. Only a profile of a run on a GPU shows that this does not stall.
    """

    @pytest.fixture
    def streams(self, monkeypatch):
        streams = cuda_stand_ins.Streams(monkeypatch)
        cuda_stand_ins.record_copies(streams, monkeypatch)
        return streams

    def test_event_is_on_the_stream_of_the_copies(self, streams):
        """The state may be on another device than the current one, whose stream knows nothing of the copies."""
        arrived = start_copy([on_device(torch.tensor(0.5))])
        copy = "asynchronous copy to the host on default stream of 1"
        assert streams.acts == ["pinned memory", copy, "event on default stream of 1"]
        assert arrived() == [0.5]
        assert streams.acts[3:] == ["host waits for the event on default stream of 1"]

    def test_flags_wait_for_their_own_copy_only(self, streams):
        flag = on_device(torch.tensor(True))
        read = start_copy_of_flags(fx.Control(stop=flag, reason="late"))
        assert streams.acts[-1] == "event on default stream of 1"
        assert read().reasons("stop") == ["late"]
        assert streams.acts[-1] == "host waits for the event on default stream of 1"

    def test_scalars_on_the_host_are_not_copied_to_the_device(self, streams, monkeypatch):
        """A copy of a scalar to the device synchronizes with it."""
        monkeypatch.setattr(torch.Tensor, "to", lambda *args, **options: pytest.fail("copied to a device"))
        assert start_copy([torch.tensor(1), on_device(torch.tensor(2)), 3])() == [1, 2, 3]
