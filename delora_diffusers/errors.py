"""The exception for input that the user can correct."""


class InputError(ValueError):
    """Invalid user input; the message is one sentence that says what is wrong and how to fix it."""
