"""The commands. Exit codes: 0, 1 (check found faults), 2 (usage or settings)."""

from __future__ import annotations

import os
import signal
import sys

from proxy import settings
from proxy.cli.options import parser
from proxy.cli.output import complain


def main(argv: list[str] | None = None) -> int:
    replace_closed_streams()
    try:
        options = parser().parse_args(argv)
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except settings.SettingsError as error:
        print(f"chat-proxy: {len(error.faults)} fault(s) in the settings:", file=sys.stderr)
        for fault in error.faults:
            print(f"  {fault}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head -1`: the reader has closed the pipe
        return 2
    except OSError as error:
        return complain(error.strerror or str(error))
    except KeyboardInterrupt:  # as a shell expects it: by the signal, so that its loops end, too
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
        raise
    finally:
        drop_unwritten()


def replace_closed_streams() -> None:
    """Opens /dev/null for closed standard streams; otherwise a socket could become descriptor 1, the log."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, closefd=False))


def drop_unwritten() -> None:
    """Drops unwritten output; otherwise the interpreter would write it again at exit, and report an error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
