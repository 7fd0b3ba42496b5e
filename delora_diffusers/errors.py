"""The one exception of this project for input that the user can correct."""


class InputError(ValueError):
    """Bad input from the user; the message is one sentence that names what is wrong and the remedy."""
