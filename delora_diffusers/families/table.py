"""The families by the class of their pipeline."""

import functools
import importlib

from delora_diffusers.families.family import Family
from delora_diffusers.names import FAMILIES


@functools.cache
def family_of(pipeline_class: str) -> Family:
    """The family of a pipeline class."""
    return importlib.import_module(f"{__package__}.{FAMILIES[pipeline_class]}").FAMILY
