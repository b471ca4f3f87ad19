"""The home of the local step that server, client and simulation share. Importing it loads torch."""
