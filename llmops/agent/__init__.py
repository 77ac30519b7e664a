"""The supervisor inside every job. Standard library alone, Python 3.9 or later: it travels as a zipapp.

One *coordinator* per job owns the attempts: it claims them, starts a *node agent* on every node, turns every signal
into one stop request, records how each attempt ended and asks the backend's policy what comes next. A *node agent*
starts the ranks of its node, keeps their output, watches their heartbeats and kills what it started.
"""
