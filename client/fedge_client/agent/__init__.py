"""The resident agent of a device: enrolment, the link to the hub, and the training child."""
