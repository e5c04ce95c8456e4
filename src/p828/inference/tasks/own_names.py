"""The names of p828's own tasks, for those who need no task."""

OWN_NAMES = ("cloze_english", "cloze_python")
