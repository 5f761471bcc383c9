"""Tells errors that a user can mend from bugs: the first are shown as one sentence, the second as a traceback."""

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError


def as_sentence(error: BaseException) -> str | None:
    """Return one line for an error that a user can mend, None for any other.

    An OSError is about files or the network, wherever it is raised. A ValueError, KeyError or ImportError counts if this
    package raised it on purpose, that is in one of its own modules; the messages of its ValueErrors and KeyErrors are
    whole sentences, which what Python says of a failed `int(...)` or a missing key is not. What a configuration's check
    raised is taken out of the error that transformers wraps around it. Of an answer of the Hub, code and path are shown.

    Args:
        error: as caught, with its traceback.

    Example:
        >>> as_sentence(FileNotFoundError(2, "No such file or directory", "facts.jsonl"))
        'facts.jsonl: No such file or directory.'
        >>> as_sentence(ZeroDivisionError("division by zero")) is None
        True
    """
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        return as_sentence(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        what = f"HTTP {error.response.status_code} for {error.response.url.path}"
        return f"The Hub answers {what}; check the name, and that your token may do this."
    if isinstance(error, HFValidationError):
        return f"{_one_line(str(error)).rstrip('.')}."
    if isinstance(error, OSError):
        if error.errno is not None and error.filename is not None:
            return f"{error.filename}: {error.strerror}."
        return _one_line(str(error))
    if isinstance(error, ValueError | KeyError) and _is_own(error):
        text = _one_line(str(error.args[0]) if error.args else "")
        return text if text.endswith((".", "?")) else None
    # A failed import statement carries the module's name; what this package raises by hand does not.
    if type(error) is ImportError and error.name is None and _is_own(error):
        return _one_line(str(error))
    return None


def _is_own(error: BaseException) -> bool:
    """Whether the innermost frame of the traceback is in this package."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").startswith("karla_hf.")


def _one_line(text: str) -> str:
    return " ".join(text.split())
