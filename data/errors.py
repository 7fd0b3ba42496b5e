"""The one exception that ``data`` and ``eval`` raise for input that a user can put right."""


class InputError(ValueError):
    """Bad input from the user; the message is one sentence that names what is wrong and the remedy."""
