"""What every script shares: the command line, errors for people."""

import os
import sys
from collections.abc import Callable
from typing import Any


def run_script(main: Callable[..., Any]) -> None:
    """Run main with the command line's arguments.

    The rule of the house: a ValueError or an OSError is the user's to mend and says so in one sentence, which goes to
    stderr with exit code 2. Anything else is a bug of ours and keeps its traceback, as does everything when
    LIT_SWA_TRACEBACK=1 is set.
    """
    from jsonargparse import CLI

    try:
        CLI(main, as_positional=False)
    except (ValueError, OSError) as e:
        if os.environ.get("LIT_SWA_TRACEBACK") == "1":
            raise
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
