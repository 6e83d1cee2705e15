"""Renders a run folder as one HTML page, which opens in a browser without a server or a network connection."""

from fxtrain.report._page import page as page
from fxtrain.report._read import read_run as read_run
from fxtrain.report._run import Mark as Mark
from fxtrain.report._run import Run as Run
from fxtrain.report._run import RunFolderError as RunFolderError
