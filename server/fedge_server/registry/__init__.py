"""What the cloud keeps: runs and rounds in a database, big bytes by digest, signed releases for devices."""
