"""Pipelines of public libraries, with torch's LSTM and moved over: ``make test-libraries``, ``make bench-libraries``.

A file for each library has its ``PIPELINES`` and imports the library; the groups of the Makefile say which of them can
be installed beside each other.  ``pipeline`` says what a pipeline is and runs it, ``parity`` finds that two runs agree,
``table`` holds the rows and makes the table of docs/libraries.md, and ``pages`` runs what else that page tells; these
import no library.
"""
