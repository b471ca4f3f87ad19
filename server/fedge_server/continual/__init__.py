"""When to learn again, and what comes next: decided from values alone."""
