"""How a release reaches devices in stages, and how a bad one stops by itself.

A pure core (`evidence`, `plan`, `assignment`, `state`, `deciding`) decides; `records`, `service` and `audit`
keep it in the database.
"""
