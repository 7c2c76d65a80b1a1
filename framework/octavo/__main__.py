"""`python -m octavo` is `octavo`."""

from octavo.cli import main

raise SystemExit(main())
