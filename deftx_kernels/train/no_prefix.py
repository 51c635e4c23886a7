"""The annotation of settings that are dataclasses: on the command line, their fields are options without a prefix.

Only the command needs tyro: training loops that use `Recipe` or `learn_vector` do not.
"""

from typing import Any

NO_PREFIX: Any
try:
    import tyro
except ImportError:
    NO_PREFIX = None
else:
    NO_PREFIX = tyro.conf.arg(name="")
