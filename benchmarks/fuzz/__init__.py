"""Fuzzes the training loop with random programs, run uninterrupted, interrupted, resumed, and resumed when finished.

A ``Program`` (``program.py``) describes one training run as plain data: model, data source, limits, callbacks and their
requests, the options of the loop and the checkpointer, and the cut that ends each session. The modules:

- ``draw.py`` generates a program from a seed;
- ``build.py`` and ``sources.py`` construct the arguments of ``fit`` from a program;
- ``session.py`` runs one session, and ``cutting.py`` interrupts it;
- ``check.py`` runs all sessions of a program, and ``shrink.py`` finds the smallest program with the same failure.

The laws (``laws.py``, ``order.py``) compare the sessions with a reference: the uninterrupted run on the plainest path
(eager, one step per call, no lag, no donation).

- The final states and the newest checkpoint are bit-identical to the reference.
- The events of all sessions together are the reference's events, with their metrics, requests and logs. A signal
  repeats only an unfinished evaluation, and an exception at most one call of the step.
- The order of events is legal, and requests are handled in the order rewind, evaluate, end of epoch, save, stop.
- JSON lines and CSV files have one point per step, equal to the reference's. The histories of the sessions join to the
  reference's history.
- The stop reason is the same, and resuming a finished run does nothing.
- The state passed to ``fit`` is unchanged, and running a program twice gives the same result.
- Every program ends within a bounded number of events and seconds.
- Steps per call, lag, donation, observers and the call path of a resumed session have no effect on the result.

Results: 2,000 eager programs (seeds 40000 to 41999) ran without a failure, at 10 programs per second on one of two
shared cores. fxtrain rejected 30 of them, because they end an epoch whose length is not known yet. 24 compiled programs
(seeds 10 to 33) took 2 to 4 seconds each. About 19,000 programs revealed 21 bugs, nearly all of them in the loop.
"""
