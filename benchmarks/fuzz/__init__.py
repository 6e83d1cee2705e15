"""Fuzz: random programs over the grammar, each run whole, cut, resumed and resumed once more.

A ``Program`` (``program.py``) is one training run as plain data: model, source, limits, callbacks and their requests,
the settings of the loop and the checkpointer, and where each session is cut. ``draw.py`` draws one from a seed,
``build.py`` and ``sources.py`` make the arguments of ``fit`` from it, ``session.py`` runs one session, ``cutting.py``
cuts it, ``check.py`` runs all of them, and ``shrink.py`` finds the smallest program that fails alike.

The laws (``laws.py``, ``order.py``), each against the run that nothing cut, on the plainest path (eager, one step in a
call, stops read at once, nothing donated):

- the final states are equal to the bit, and so is the newest checkpoint;
- the sessions together tell its events, with their metrics, requests and logs; a signal repeats nothing but an
  unfinished evaluation, an exception at most one call of the step;
- the order of events is legal, and every request is honored, in the order rewind, evaluate, end of epoch, save, stop;
- JSON lines and CSV have one point for each step, the same ones, and the histories of the sessions join to its history;
- the reason to stop is the same, and a finished run that is resumed does nothing;
- the state given to ``fit`` is unchanged, and the same program run twice gives the same run;
- every program ends: a session is bounded in events and in seconds;
- steps in a call, lag, donation, observers and the call path of a resumed session change nothing.

Run: 2,000 eager programs (seeds 40000 to 41999) without a failure, 10 a second on one of two shared cores; 30 of them
fxtrain refuses, because they end an epoch of a length that is still unknown. 24 compiled programs (seeds 10 to 33) take
2 to 4 seconds each. Among about 19,000 programs 21 mistakes were found, nearly all of them in the loop.
"""
