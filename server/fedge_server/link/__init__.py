"""The worker's side of the link: a Flower Grid over the hub, and the process of one run."""
