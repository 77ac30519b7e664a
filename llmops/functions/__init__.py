"""Functions as runs: how a call gets into a job, and what it returned gets back.

A run directory may be in a store that others can write to, and who can choose what is unpickled can run anything. So
every pickle is signed with a key that is in the user's own home alone (:mod:`llmops.functions.signed`), by the
submitter for the job and by the job for the submitter, and is unpickled only if it was written for exactly this place:
this run, this call or attempt, this rank.

::

    calls/0000           the call; of a study, one for each element
    saved/0002           what attempt 2's ``checkpoint()`` wants called next
    returned/0002-0000   what rank 0 of attempt 2 returned or raised
"""
