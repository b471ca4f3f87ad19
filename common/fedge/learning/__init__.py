"""The home of the local step that server, client and simulation share. Importing it loads torch."""

import os

# OpenMP reads this when torch is loaded. Threads that spin while they wait slow each other down as soon as
# the machine has other work: a round of McMahan's CNN took 29 s with spinning and 7 s without beside one busy
# process on two cores. Whoever sets the variable himself is obeyed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
