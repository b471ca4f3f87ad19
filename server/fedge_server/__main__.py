"""`python -m fedge_server` is the command `fedge-server`."""

from __future__ import annotations

from fedge_server.cli import main

raise SystemExit(main())
