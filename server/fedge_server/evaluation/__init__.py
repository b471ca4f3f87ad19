"""How sure a run's figures are: intervals over the test data, distributions over clients."""
