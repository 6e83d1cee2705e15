"""Output of ``progress``: a panel that is redrawn in place below the lines that stay, or a log of lines."""

from __future__ import annotations

import io
import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from fxtrain.core import LoopEvent, encodable, printable
from fxtrain.observers._running_averages import ends_epoch, fraction
from fxtrain.observers._spacing import Spacing

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_PRE = '<pre style="white-space:pre;line-height:normal;font-family:Menlo,Consolas,monospace">{code}</pre>'
_MIN_REDRAW_SECONDS = 0.2
_MAX_LINES_OF_CELL = 200
_MIN_EPOCHS_WITHOUT_TENTHS = 10

Column = tuple[str, str]
"""A label, possibly empty, and a value."""


class EpochFrame(NamedTuple):
    """The texts to show about the current epoch."""

    share: float  # of the epoch, in [0, 1]
    done: str  # epochs done, as a fraction
    count: str  # whole epochs done
    seconds: str | None
    remaining: str | None  # until the end of the epoch


class EvaluationFrame(NamedTuple):
    """The texts to show about the current evaluation."""

    share: float | None  # in [0, 1]
    parts: list[str]  # batches done, speed and time left


class Frame(NamedTuple):
    """The texts to show at one moment of a run."""

    step: str
    epoch: EpochFrame | None
    columns: list[Column]  # metrics, throughput and memory
    elapsed: str
    remaining: str | None
    evaluating: EvaluationFrame | None
    evaluation: list[Column]  # the latest evaluation; empty before the first


def display(file: TextIO | None, seconds: float) -> Lines | Panel:
    """Returns a panel for a terminal or a notebook, and lines for other outputs, such as a file.

    Args:
        file: The output. Defaults to standard output.
        seconds: Time between two lines.
    """
    import rich
    from rich.console import Console

    # The shared console makes the output of other code appear above the panel instead of inside it.
    console = rich.get_console() if file is None else Console(file=file, force_jupyter=False)
    if console.is_jupyter:
        return Panel(Cell())
    return Panel(Terminal(console)) if console.is_terminal and not console.is_dumb_terminal else Lines(file, seconds)


class Lines:
    """A log with one line per update."""

    def __init__(self, file: TextIO | None, seconds: float) -> None:
        self._file = file
        self._seconds = seconds
        self._spacing = Spacing(seconds, parts=10)
        self._eval_time: float | None = None  # of the last line of the current evaluation, or of its first batch

    def phase(self, event: LoopEvent, frame: Frame, text: str) -> None:
        pass

    def compiling(self, text: str, seconds: str, before: str, is_first: bool) -> None:
        if is_first:
            self._print(text + before)

    def compiled(self, text: str) -> None:
        self._print(text)

    def step(self, event: LoopEvent, frame: Callable[[], Frame]) -> None:
        many_epochs = event.total_epochs is not None and event.total_epochs >= _MIN_EPOCHS_WITHOUT_TENTHS
        # A line of the epoch follows its last step.
        if self._spacing.is_due(event, by_time=many_epochs) and not ends_epoch(event):
            shown = frame()
            epoch = shown.epoch
            self._print(
                f"step {shown.step}",
                epoch and f"epoch {epoch.done}",
                *_labeled(shown.columns),
                epoch and epoch.seconds,
                shown.elapsed,
                shown.remaining,
            )

    def evaluating(self, event: LoopEvent, frame: Callable[[], Frame]) -> None:
        if self._eval_time is None or event.time - self._eval_time >= self._seconds:
            if self._eval_time is not None and (evaluating := frame().evaluating):
                self._print(f"evaluation at step {event.step}", *evaluating.parts)
            self._eval_time = event.time

    def evaluated(self, event: LoopEvent, frame: Frame) -> None:
        self._eval_time = None

    def leave(self, event: LoopEvent, label: str, columns: list[Column]) -> None:
        self._print(label, *_labeled(columns))

    def note(self, event: LoopEvent, text: str) -> None:
        self._print(text)

    def interrupted(self, event: LoopEvent, text: str) -> None:
        self._print(text)

    def end(self, event: LoopEvent, frame: Frame, text: str) -> None:
        self._print(f"ended: {text}")

    def close(self) -> None:
        pass

    def _print(self, *parts: str | None) -> None:
        """Prints one line. Control characters and those that the encoding lacks are escaped."""
        file = self._file or sys.stdout
        text = " | ".join(part for part in parts if part)
        print(encodable(printable(text), getattr(file, "encoding", None)), file=file, flush=True)


class Terminal:
    """Redraws a panel in place on a terminal, which rich controls until ``close``."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self.width: int = console.width
        self._live = Live(
            console=console,
            auto_refresh=False,
            # Text printed to the terminal appears above the panel. Output redirected to a file must stay there.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start()

    def draw(self, content: RenderableType) -> None:
        self.width = self._live.console.width  # the window may be resized
        self._live.update(content, refresh=True)

    def leave(self, line: Text) -> None:
        self._live.console.print(line, highlight=False)

    def close(self) -> None:
        self._live.stop()


class Cell:
    """Redraws a panel in the output of a notebook cell, below the lines that stay.

    The output is HTML that is replaced, so it needs no widgets, and a saved notebook stores the last state alone.
    """

    def __init__(self) -> None:
        self.width = 100
        self._handle: Any = None
        self._lines: deque[Text] = deque(maxlen=_MAX_LINES_OF_CELL)

    def draw(self, content: RenderableType) -> None:
        import IPython.display
        from rich.console import Console

        apart = io.StringIO()  # discarded; the recorded output is displayed instead
        console = Console(file=apart, record=True, width=self.width, force_jupyter=False, color_system="truecolor")
        for line in self._lines:
            console.print(line, highlight=False, no_wrap=True, crop=False, overflow="ignore")
        console.print(content)
        lines = console.export_text(clear=False).splitlines()
        shown = {
            "text/html": console.export_html(inline_styles=True, code_format=_PRE),
            "text/plain": "\n".join(line.rstrip() for line in lines),
        }
        if self._handle is None:
            self._handle = IPython.display.display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)

    def leave(self, line: Text) -> None:
        self._lines.append(line)

    def close(self) -> None:
        pass


class Panel:
    """A few lines that are redrawn in place.

    It is redrawn by events; those of steps and evaluation batches redraw it five times a second at most. While a step
    compiles, it is redrawn each second, from a thread.
    """

    def __init__(self, place: Terminal | Cell) -> None:
        self._place = place
        self._event: LoopEvent | None = None  # at which it was drawn
        self._frame: Frame | None = None
        self._phase = ""  # the current activity, while no steps run
        self._has_left = False  # whether an epoch or an evaluation has left a line
        self._drawn = -_MIN_REDRAW_SECONDS

    def phase(self, event: LoopEvent, frame: Frame, text: str) -> None:
        self._phase = text
        self._show(event, frame)

    def compiling(self, text: str, seconds: str, before: str, is_first: bool) -> None:
        if self._event is not None and self._frame is not None:
            self.phase(self._event, self._frame, text + seconds + before)

    def compiled(self, text: str) -> None:
        if self._event is not None:
            self._add_line(self._event, _text(text, style="dim"))

    def step(self, event: LoopEvent, frame: Callable[[], Frame]) -> None:
        if self._phase or event.time - self._drawn >= _MIN_REDRAW_SECONDS or fraction(event) == 1.0:
            self._phase = ""
            self._show(event, frame())

    def evaluating(self, event: LoopEvent, frame: Callable[[], Frame]) -> None:
        if self._phase or event.time - self._drawn >= _MIN_REDRAW_SECONDS:
            self._phase = ""
            self._show(event, frame())

    def evaluated(self, event: LoopEvent, frame: Frame) -> None:
        self._phase = ""
        self._show(event, frame)

    def leave(self, event: LoopEvent, label: str, columns: list[Column]) -> None:
        self._has_left = True
        self._add_line(event, _styled([("", label), *columns]))

    def note(self, event: LoopEvent, text: str) -> None:
        self._add_line(event, _text(text, style="yellow"))

    def interrupted(self, event: LoopEvent, text: str) -> None:
        self._end([], text)

    def end(self, event: LoopEvent, frame: Frame, text: str) -> None:
        self._end([] if self._has_left else frame.columns, f"step {frame.step.strip()}: {text}")

    def close(self) -> None:
        self._place.close()

    def _end(self, columns: list[Column], text: str) -> None:
        table = _grid()
        if columns:
            table.add_row("", _styled(columns))
        table.add_row(_label("end"), _text(text))
        self._place.draw(table)

    def _add_line(self, event: LoopEvent, line: Text) -> None:
        self._phase = ""
        self._place.leave(line)
        self._show(event, self._frame and self._frame._replace(evaluating=None))

    def _show(self, event: LoopEvent, frame: Frame | None) -> None:
        self._event, self._frame, self._drawn = event, frame, event.time
        table = _grid()
        if frame is not None:
            self._add_rows(table, event, frame)
        self._place.draw(table)

    def _add_rows(self, table: Table, event: LoopEvent, frame: Frame) -> None:
        width = min(max(self._place.width - 50, 8), 40)
        table.add_row(_label("train"), self._bar(fraction(event), width, frame.step, frame.elapsed, frame.remaining))
        if (epoch := frame.epoch) is not None:
            count = epoch.count.rjust(len(frame.step))
            table.add_row(_label("epoch"), self._bar(epoch.share, width, count, epoch.seconds, epoch.remaining))
        if self._phase or frame.columns:
            table.add_row("", _text(self._phase, style="yellow") if self._phase else _styled(frame.columns))
        if (evaluating := frame.evaluating) is not None:
            table.add_row(_label("eval"), self._bar(evaluating.share, width, *evaluating.parts))
        elif frame.evaluation:
            table.add_row(_label("eval"), _styled(frame.evaluation))

    def _bar(self, share: float | None, width: int, *texts: str | None) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        total = None if share is None else 1.0  # without a total, the bar pulses
        bar = ProgressBar(total=total, completed=share or 0.0, width=width, animation_time=self._drawn)
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_row(bar, _text("   ".join(filter(None, texts))))
        return row


def _grid() -> Table:
    from rich.table import Table

    return Table.grid(padding=(0, 2, 0, 0))


def _text(text: str, style: str = "") -> Text:
    """Returns a line for rich, as a ``Text`` because brackets in names would be parsed as markup in a string."""
    from rich.text import Text

    return Text(printable(text), style=style)


def _label(text: str) -> Text:
    return _text(text, style="bold")


def _labeled(columns: list[Column]) -> list[str]:
    return [f"{label} {value}" if label else value for label, value in columns]


def _styled(columns: list[Column]) -> Text:
    from rich.text import Text

    return Text("   ").join(
        Text.assemble((f"{printable(label)} ", "dim"), printable(value)) if label else _text(value)
        for label, value in columns
    )
