"""``python -m axiscap``: the command line."""

from axiscap.cli.main import main

main()
