"""Renders a run folder as one HTML page, which opens in a browser without a server or a network connection."""

from fxtrain.report._page import page
from fxtrain.report._read import read_run
from fxtrain.report._run import Mark, Run, RunFolderError

__all__ = ["Run", "RunFolderError", "page", "read_run"]
