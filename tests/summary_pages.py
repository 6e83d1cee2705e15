"""The page that the summary observer prints, and its panels and facts."""

import io

from fxtrain import observers
from fxtrain.core import Control, FitBegin

NOTHING = Control()


def printed(state, depth=2, rows=30, **event):
    file = io.StringIO()
    observers.summary(depth=depth, rows=rows, file=file)(state, FitBegin(step=int(state.step), **event), NOTHING)
    return file.getvalue()


def panels(page):
    """The lines of each panel, without their indentation."""
    found, lines = {}, []
    for line in page.splitlines():
        if line.startswith("  "):
            lines.append(line[2:])
        else:
            lines = found[line] = []
    return found


def facts(page, title):
    return {line[:11].strip(): line[13:] for line in panels(page).get(title, [])}
