"""`python -m argrad_service` is `argrad serve`."""

import sys

from argrad_service.server import serve_command

sys.exit(serve_command(sys.argv[1:]))
