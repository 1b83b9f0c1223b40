"""The benchmark: ``python -m bench`` from the repository's root, or ``pytest bench/`` over the same cases.

``cases`` says what is run, ``providers`` and ``onnx_peer`` by whom, ``verify`` that they agree, ``timing`` how long it
takes, ``memory`` how much it needs; ``run`` drives them and ``results`` keeps the rows; ``report`` and ``plots`` make
the README's table and the figures from those rows and from nothing else.
"""
