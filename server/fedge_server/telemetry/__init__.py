"""Telemetry on the server: windows are taken once each, kept for a while, added up, and watched for drift."""
