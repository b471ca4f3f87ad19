"""`python -m fedge_client` is the command `fedge-client`."""

from __future__ import annotations

from fedge_client.cli import main

raise SystemExit(main())
