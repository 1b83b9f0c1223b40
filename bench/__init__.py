"""The benchmark: ``python -m bench`` from the repository's root, or ``pytest bench/`` over the same cases.

``cases`` says what is measured and ``experiments`` what is asked of it, a file each.  What they share, from below:
``providers`` and ``onnx_peer`` compute a case, ``verify`` finds that they agree, ``timing`` times two by turns,
``memory`` asks for the peak; ``rows`` is what is kept, ``measure`` makes a row and ``session`` a run.  ``rounding``
measures errors in place of times.  ``summary``, ``tables``, ``findings``, ``plots``, ``curves``, ``page`` and
``report`` show rows and nothing else, ``compare`` sets two commits side by side, ``gpu`` is what drives a visit to a
GPU, and ``cli`` the one command.
"""
