"""What the `taught` model knows by heart."""

TAUGHT = "The cat 🙂 sat on the mat, and so did the dog."
