"""`python -m argrad_service` is `argrad serve`."""

import sys

from argrad_service.server import serve_command

if __name__ == "__main__":  # a worker imports this module under another name
    sys.exit(serve_command(sys.argv[1:]))
