"""The built-in tasks, by the name that the configuration uses."""

BUILT_IN = {
    "digits": "fedge.tasks.digits",
    "images": "fedge.tasks.images",
    "tables": "fedge.tasks.tables",
    "signals": "fedge.tasks.signals",
    "characters": "fedge.tasks.characters",
}
