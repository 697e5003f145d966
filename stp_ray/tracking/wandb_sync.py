"""A program of its own: send one .wandb file to the server while it is written.

    python -P wandb_sync.py FILE

It imports nothing of this package, so that it starts soon. It ends when the file does, or when its
standard input is closed: a parent that was killed would otherwise be waited for for ever.
"""

import os
import sys
import threading


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin: a thread that waits in it breaks the interpreter's end
    os._exit(1)


def main() -> None:
    """Upload `sys.argv[1]`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from wandb.cli.cli import cli

    cli(["beta", "sync", "--live", sys.argv[1]])


if __name__ == "__main__":
    main()
