"""Compilation of the Numba kernels, and the cache of their machine code.

``inline`` marks a device function, ``kernel`` an entry point, whose one argument is the address of an argument struct
unless it has another signature.  A kernel's machine code is cached on disk in one file per kernel, signature, processor
and source state.  Numba's own cache stamps a function with the one file that it is defined in, and fails at import if
no directory is writable; here the stamp covers every source of this package and the versions of Numba and llvmlite,
writing is atomic (concurrent processes at worst compile twice), and a cache that is read-only, missing or damaged means
compiling in memory, never an error.

The directory is Numba's ``NUMBA_CACHE_DIR`` if that is set, else ``~/.cache/lstmcore-kernels`` (``XDG_CACHE_HOME`` is
honoured).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import re
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import compiler
from numba.core.caching import _Cache
from numba.core.codegen import JITCodeLibrary
from numba.core.serialize import dumps

from ..sources import stamp

OPTIONS = {"nogil": True, "error_model": "numpy"}


class _Linked(JITCodeLibrary):
    """The code of a device function, which is optimised only where it is linked, together with its callers.

    Numba would also optimise it alone and compile it to machine code: for a kernel's two dozen functions that took more
    than half of the time of the first call.
    """

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


class _DevicePipeline(compiler.Compiler):
    def __init__(self, typingctx: Any, targetctx: Any, library: None, *given: Any) -> None:
        super().__init__(typingctx, targetctx, _Linked(targetctx.codegen(), "device"), *given)


class _NoEntry:
    """Placeholder for the entry point of a function that has no machine code of its own."""


def _device(function: Callable, **options: bool) -> Callable:
    """A function that only kernels call: its code is linked into theirs, and never made executable by itself.

    (Numba would generate machine code for each.)
    """
    dispatcher = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **options, **OPTIONS)(function)

    device_compiler = dispatcher._compiler

    def without_machine_code(flags):
        flags.no_compile = True
        return flags

    def compile_core(arguments, return_type):
        # Numba knows a compiled function by its entry point; this one has none, but needs an identity.
        result = type(device_compiler)._compile_core(device_compiler, arguments, return_type)
        result = result._replace(entry_point=_NoEntry())
        dispatcher.targetctx.insert_user_function(result.entry_point, result.fndesc, [result.library])
        return result

    def add_overload(result):
        dispatcher.overloads[tuple(result.signature.args)] = result

    device_compiler._customize_flags = without_machine_code
    device_compiler._compile_core = compile_core
    device_compiler.pipeline_class = _DevicePipeline
    dispatcher.add_overload = add_overload
    return dispatcher


def inline(function: Callable) -> Callable:
    """A device function that is always inlined.

    Nothing else would be safe: Numba names functions by a counter of the process, so kernels cached by different
    processes may contain different functions of one name, and all would call the first one loaded.
    """
    return _device(function, forceinline=True)


ADDRESS = numba.void(numba.int64)  # the signature of a kernel that threads run: the address of its arguments


def kernel(key: str, signature: Any = ADDRESS) -> Callable[[Callable], Any]:
    """Compiles the decorated function for ``signature``, from the disk cache if that has it.

    ``key`` distinguishes this kernel from others of the same name: it has to name everything that the function closes
    over.  A kernel of one argument struct (``arguments.py``) can also be called from C, at its ``address``.
    """

    def decorate(function: Callable) -> Any:
        # The key is part of the symbol too: Numba distinguishes functions of one name by a counter that starts at 0 in
        # each process, and two kernels loaded from the cache must not have the same symbol.
        suffix = re.sub(r"\W+", "_", key)
        function.__name__ = f"{function.__name__}_{suffix}"
        function.__qualname__ = f"{function.__qualname__}_{suffix}"
        from_c = signature == ADDRESS
        dispatcher = numba.njit(**OPTIONS, no_cfunc_wrapper=not from_c)(function)
        dispatcher._cache = DiskCache(f"{function.__qualname__}:{key}", function.__name__)
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        if from_c:
            (compiled,) = dispatcher.overloads.values()
            dispatcher.address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)
        return dispatcher

    return decorate


def cache_directory() -> Path:
    """The directory of the machine code (it may not exist yet).

    It is not called ``lstmcore``: next to a script, or in a current directory, that name would hide the package.
    """
    chosen = numba.config.CACHE_DIR
    if chosen:
        return Path(chosen) / "lstmcore-kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "lstmcore-kernels"
    except RuntimeError:  # no home directory: a place of this user's own
        return Path(tempfile.gettempdir()) / f"lstmcore-{os.getuid()}"


@functools.cache
def source_stamp() -> str:
    """A hash of every source that Numba's kernels may depend on, and of the compilers' versions."""
    return stamp(
        Path(__file__).parent, f"{numba.__version__} {llvmlite.__version__}"
    )  # the GPU's are Triton's to cache


def _trusted(status: os.stat_result) -> bool:
    """Whether nobody but this user, root, and whom they let, can have written a file: its content will be executed."""
    if not hasattr(os, "getuid"):
        return True
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & stat.S_IWOTH


def _trusted_payload(path: Path) -> bytes | None:
    """The content of a file of the cache; None if the kernel has to be compiled again."""
    try:
        with path.open("rb") as file:  # one file is looked at and read, whatever is put into its place meanwhile
            if not _trusted(os.fstat(file.fileno())):
                return None
            content = file.read()
    except OSError:
        return None  # missing, or not readable
    digest, payload = content[:32], content[32:]
    return payload if hashlib.sha256(payload).digest() == digest else None  # else cut short, or damaged


@functools.cache
def _tell_once() -> None:
    """Says on stderr why a first call takes long."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be no stderr, or no reader of it
        print(
            f"lstmcore compiles its CPU kernels, which takes some ten seconds, and keeps them in "
            f"{cache_directory()} if it can; python -m lstmcore prewarm does it ahead",
            file=sys.stderr,
        )


class DiskCache(_Cache):
    """One file per compiled signature: a SHA-256 of the rest, then Numba's serialised compile result."""

    def __init__(self, key: str, name: str):
        self._key, self._name = key, name
        self._enabled = True

    @property
    def cache_path(self) -> str:
        return str(cache_directory())

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        for path in cache_directory().glob(f"{self._name}-*.bin"):
            path.unlink(missing_ok=True)

    def _path(self, signature, codegen) -> Path:
        identity = repr((self._key, str(signature), codegen.magic_tuple(), source_stamp()))
        return cache_directory() / f"{self._name}-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.bin"

    def load_overload(self, signature, target_context):
        target_context.refresh()
        if not self._enabled:
            return None
        payload = _trusted_payload(self._path(signature, target_context.codegen()))
        if payload is None:
            _tell_once()
            return None
        return compiler.CompileResult._rebuild(target_context, *pickle.loads(payload))

    def save_overload(self, signature, result) -> None:
        if not self._enabled:
            return
        payload = dumps(result._reduce())
        path = self._path(signature, result.codegen)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as file:
                written = Path(file.name)
                try:
                    file.write(hashlib.sha256(payload).digest() + payload)
                    file.close()
                    os.replace(written, path)
                except OSError:
                    written.unlink(missing_ok=True)
                    raise
        except OSError:
            return  # read-only or full: the kernel stays in memory
