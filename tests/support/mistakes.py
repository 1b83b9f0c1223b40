"""The same mistake made with a module of torch's and with ours."""

from __future__ import annotations


def raised_by(function, *args, **kwargs) -> Exception | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None


def assert_same_mistake(ours: Exception | None, theirs: Exception | None, named: tuple[str, ...]) -> None:
    assert theirs is not None, "torch takes this: it is no mistake"
    assert ours is not None, f"torch raises {theirs!r}, and nothing was raised here"
    assert type(ours) is type(theirs), f"{ours!r}, where torch raises {theirs!r}"
    for text in named:
        assert text in str(ours), f"the message should name {text!r}: {ours}"
