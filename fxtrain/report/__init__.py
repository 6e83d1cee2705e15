"""Report: the folder of a run as one page, which opens in a browser without a server and without a network."""

from fxtrain.report.page import page as page
from fxtrain.report.read import read_run as read_run
from fxtrain.report.run import Mark as Mark
from fxtrain.report.run import Run as Run
from fxtrain.report.run import RunFolderError as RunFolderError
