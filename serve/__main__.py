"""`python -m serve BUNDLE`: an HTTP server for one bundle."""

from __future__ import annotations

import sys

from models.extras import missing
from serve.settings import parse


def main() -> int:
    """Runs the command; returns its exit code, which --help explains."""
    settings = parse()
    try:
        from serve.server import BundleError, DeviceError, KeysError, ListenError, run

        run(settings)
    # These two first: the others' names are not there when an import fails or is interrupted.
    except ImportError as error:
        return _fail(missing(error, "cpu"), 2)
    except KeyboardInterrupt:
        return _fail("stopped at once", 130)
    except (BundleError, DeviceError, KeysError, ListenError) as error:
        return _fail(str(error), 2)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"python -m serve: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
