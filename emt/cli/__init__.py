"""The `emt` command. Thin: each subcommand is a few calls of the library.

Results go to stdout, progress and errors to stderr. A mistake of the user's is one line and exit
code 2; what is no mistake of the user's keeps its traceback. `emt verify` ends with 1 when it finds
damage.
"""

from emt.cli.command import main
from emt.cli.model_options import quiet

__all__ = ["main", "quiet"]
