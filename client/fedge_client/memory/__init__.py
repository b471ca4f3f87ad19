"""A bounded sample of what a device has seen, with labels, to learn from: on the device alone, by consent."""
