from __future__ import annotations

from hypothesis import HealthCheck, settings

# A slow or busy machine must not fail a test; the same examples come every time.
settings.register_profile(
    "fedge", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fedge")
