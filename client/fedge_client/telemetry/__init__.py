"""Telemetry on the device: answers are counted where they are given, and kept until they are sent."""
