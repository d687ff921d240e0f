"""`python -m kernelhub`."""

from kernelhub.cli.main import main

main()
