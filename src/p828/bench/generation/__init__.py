"""Speed of continuing prompts: what `p828 bench generate` measures, and how its figures follow."""
